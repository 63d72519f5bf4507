"""Nested adapters stay nested through a file: loaded, they are cut, saved again and cut from the file as before."""

from __future__ import annotations

import pytest
import torch

import rankalloc as ra
from rankalloc.errors import RankallocError
from rankalloc.storage.folder import NESTED_KEY
from tests.support.adapter_folders import dense
from tests.support.models import logits_of, make_mlp
from tests.support.training import train_mlp

RANK = 4


def trained(scale: str = "lora", method: str = "dylora", budget: ra.RankBudget | None = None):
    model = make_mlp()
    adapters = ra.attach(model, rank=RANK, alpha=7, init="lora", scale=scale)
    controller = ra.RankController(adapters, budget or ra.RankBudget(fraction=1.0), 30, method)
    train_mlp(model, controller, torch.optim.AdamW(adapters.parameters(), lr=2e-2), 30)
    controller.finish()
    return model, adapters


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("scale", ["lora", "rslora"])
@pytest.mark.parametrize("budget", [None, ra.RankBudget(ranks=7)], ids=["whole", "cut at the freeze"])
def test_loaded_adapters_are_cut_like_those_that_were_saved(budget, scale, layout, tmp_path):
    model, adapters = trained(scale, budget=budget)
    folder = ra.save(adapters, tmp_path / "a", layout)
    again = make_mlp()
    loaded = ra.load(again, folder)
    assert loaded.nested and loaded.scale == scale and loaded.scaling == pytest.approx(1.0)
    whole = logits_of(again)
    for rank in range(max(loaded.ranks().values()) + 1):
        with ra.at_rank(adapters, rank), ra.at_rank(loaded, rank):
            assert loaded.ranks() == adapters.ranks()
            torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-5, atol=1e-6)
            with ra.at_rank(loaded, min(1, rank)):
                one = logits_of(again)
        with ra.at_rank(adapters, min(1, rank)):
            torch.testing.assert_close(one, logits_of(model), rtol=1e-5, atol=1e-6)
    assert torch.equal(logits_of(again), whole)


@pytest.mark.parametrize("scale", ["lora", "rslora"])
def test_saving_them_again_keeps_the_mark(scale, tmp_path):
    _, adapters = trained(scale)
    first = ra.save(adapters, tmp_path / "a")
    second = ra.save(ra.load(make_mlp(), first), tmp_path / "b")
    marks = [ra.FinishedAdapter(folder).metadata[NESTED_KEY] for folder in (first, second)]
    assert marks[0] == marks[1] and ra.FinishedAdapter(second).nested_exponent == {"lora": 1.0, "rslora": 0.5}[scale]
    for folder in (first, second):
        ra.shrink(folder, ra.RankBudget(ranks=6), tmp_path / f"{folder.name} cut", cut="nested")
    one, two = dense(tmp_path / "a cut"), dense(tmp_path / "b cut")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_what_was_trained_after_loading_counts_at_every_rank(tmp_path):
    loaded = ra.load(make_mlp(), ra.save(trained()[1], tmp_path / "a"))
    adapter = loaded.modules["0"]
    with torch.no_grad():
        adapter.lam.copy_(torch.tensor([2.0, -1.0, 0.5, 3.0]))
    expected = RANK / 2 * (adapter.P[:, :2] * adapter.lam[:2]) @ adapter.Q[:2]
    with ra.at_rank(loaded, 2):
        torch.testing.assert_close(adapter.delta_weight(), expected.detach())
    assert adapter.lam.tolist() == [2.0, -1.0, 0.5, 3.0]


def test_adapters_that_never_were_nested_are_refused(tmp_path):
    plain = trained(method="uniform", budget=ra.RankBudget(ranks=12))[1]
    untrained = ra.attach(make_mlp(), rank=RANK, init="lora")
    loaded = ra.load(make_mlp(), ra.save(plain, tmp_path / "plain"))
    mixed = tmp_path / "mixed"
    ra.shrink(ra.save(trained()[1], tmp_path / "a"), ra.RankBudget(ranks=6), mixed)  # largest singular triplets
    for adapters in (plain, untrained, loaded, ra.load(make_mlp(), mixed)):
        assert not adapters.nested
        with pytest.raises(RankallocError, match="only nested adapters"), ra.at_rank(adapters, 1):
            pass
        assert set(adapters.ranks().values()) != {1}


def test_an_unknown_scale_is_loaded_and_not_taken_for_nested(tmp_path):
    from rankalloc.storage.tensors import read_tensors, write_tensors

    model, adapters = trained()
    folder = ra.save(adapters, tmp_path / "a")
    tensors, metadata = read_tensors(folder / "adapter_model.safetensors")
    write_tensors(folder / "adapter_model.safetensors", tensors, {**metadata, NESTED_KEY: "0.25"})
    again = make_mlp()
    assert not ra.load(again, folder).nested
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-5, atol=1e-6)
    with pytest.raises(RankallocError, match="'0.25'.*cut='svd'"):
        ra.shrink(folder, ra.RankBudget(ranks=3), cut="nested")
