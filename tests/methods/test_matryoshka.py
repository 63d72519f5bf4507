"""MatryoshkaLoRA: the mixture of nested adapters that it trains, and its cuts in a model and from a file."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.errors import ConfigError
from rankalloc.methods.rules.matryoshka import WEIGHTS, diagonal, nested_ranks
from rankalloc.storage.folder import NESTED_KEY
from tests.support.models import logits_of, make_mlp
from tests.support.training import train, train_mlp

RANK, ALPHA = 6, 5.0


def trained(weights="root", budget=None, steps=30):
    model = make_mlp()
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=RANK, alpha=ALPHA, init="lora")
    controller = ra.RankController(
        adapters, budget or ra.RankBudget(fraction=1.0), steps, "matryoshka", weights=weights
    )
    train_mlp(model, controller, torch.optim.AdamW(adapters.parameters(), lr=2e-2), steps)
    controller.finish()
    return model, adapters


def mixture(p: torch.Tensor, q: torch.Tensor, weights: str, most: int = RANK) -> torch.Tensor:
    """The mean of the adapters of all ranks in S, each cut to at most ``most``; P (d_out, r), Q (r, d_in)."""
    members = [1, 2, 4, 6]
    scales = {"one": lambda rho: 1.0, "inverse": lambda rho: RANK / rho, "root": lambda rho: (RANK / rho) ** 0.5}
    cut = [scales[weights](rho) * p[:, : min(rho, most)] @ q[: min(rho, most)] for rho in members]
    return ALPHA / RANK * sum(cut) / len(members)


def test_the_diagonal_counts_the_members_that_a_triplet_is_in():
    assert nested_ranks(0) == [] and nested_ranks(1) == [1] and nested_ranks(8) == [1, 2, 4, 8]
    assert nested_ranks(12) == [1, 2, 4, 8, 12]
    torch.testing.assert_close(diagonal(4, "one"), torch.tensor([3, 2, 1, 1]).double() / 3)
    torch.testing.assert_close(diagonal(4, "inverse"), torch.tensor([7, 3, 1, 1]).double() / 3)
    assert diagonal(3, "root").tolist() == pytest.approx([(3**0.5 + 1.5**0.5 + 1) / 3, (1.5**0.5 + 1) / 3, 1 / 3])
    assert len(diagonal(0)) == 0


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_step_trains_the_mixture_and_nothing_else(weights):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9, dtype=torch.float64))
    adapters = ra.attach(model, rank=RANK, alpha=ALPHA, init="lora")
    adapters.train_in(torch.float64)
    adapter = adapters.modules["0"]
    base, p, q = adapter.base_layer, adapter.P.detach().clone(), adapter.Q.detach().clone()
    wanted = torch.optim.AdamW([p.requires_grad_(), q.requires_grad_()], lr=1e-2)
    own = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    controller = ra.RankController(adapters, ra.RankBudget(fraction=1.0), 10, "matryoshka", weights=weights)
    for step in range(10):
        x = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model.train()(x).sin().sum().backward()
        controller.observe()
        own.step()
        controller.update(own)
        own.zero_grad()
        (F.linear(x, base.weight + mixture(p, q, weights), base.bias)).sin().sum().backward()
        wanted.step()
        wanted.zero_grad()
    torch.testing.assert_close(adapter.P, p)
    torch.testing.assert_close(adapter.Q, q)
    torch.testing.assert_close(adapter.delta_weight(), mixture(p, q, weights).detach())


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("budget", [None, ra.RankBudget(ranks=11)], ids=["whole", "cut at the freeze"])
def test_every_rank_is_served_alike_from_the_model_a_loaded_one_and_the_file(budget, layout, tmp_path):
    model, adapters = trained(budget=budget)
    sizes = [adapter.rank for adapter in adapters]
    assert (sizes == [RANK] * 3) == (budget is None) and (budget is None or sum(sizes) == 11)
    folder = ra.save(adapters, tmp_path / "whole", layout)
    assert ra.FinishedAdapter(folder).nested_exponent == 0.0
    again = make_mlp()
    loaded = ra.load(again, folder)
    first = adapters.modules["0"]
    for rank in (1, 2, 4, max(sizes)):
        spent = sum(min(rank, size) for size in sizes)
        ra.shrink(folder, ra.RankBudget(ranks=spent), tmp_path / str(rank), cut="nested", layout=layout)
        file = make_mlp()
        ra.load(file, tmp_path / str(rank))
        with ra.at_rank(adapters, rank), ra.at_rank(loaded, rank):
            assert list(adapters.ranks().values()) == [min(rank, size) for size in sizes]
            wanted = mixture(first.P.detach(), first.Q.detach(), "root", min(rank, first.rank))
            torch.testing.assert_close(first.delta_weight(), wanted)
            assert torch.equal(logits_of(again), logits_of(model))
            torch.testing.assert_close(logits_of(file), logits_of(model), rtol=1e-5, atol=1e-6)
    # what was cut is nested still
    ra.shrink(tmp_path / "2", ra.RankBudget(ranks=3), tmp_path / "again", cut="nested")
    assert ra.FinishedAdapter(tmp_path / "again").metadata[NESTED_KEY] == "0"
    file = make_mlp()
    ra.load(file, tmp_path / "again")
    with ra.at_rank(adapters, 1):
        torch.testing.assert_close(logits_of(file), logits_of(model), rtol=1e-5, atol=1e-6)


def test_a_model_that_is_evaluated_computes_what_was_trained():
    model, _ = trained()
    x = torch.randn(5, 16)
    torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=1e-5, atol=1e-6)


def test_one_run_gives_the_curve_of_all_its_ranks(tmp_path):
    folder = ra.save(trained()[1], tmp_path / "whole")
    curve = ra.frontier(folder, None, lambda path: ra.FinishedAdapter(path).config["r"])
    assert curve.cut == "nested" and [point.value for point in curve.points] == [1, 2, 3, 4, 5, RANK]
    assert curve.points[0].error > curve.points[3].error > curve.points[-1].error == 0


def planted(method: str, **options) -> list[float]:
    """Losses of one run at ranks 1, 2, 4 and 8, when the task is a planted update of falling singular values."""
    teacher, model = make_mlp(), make_mlp()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in teacher:
            if isinstance(layer, nn.Linear):
                left, right = (
                    torch.linalg.qr(torch.randn(side, 8, generator=generator))[0] for side in layer.weight.shape
                )
                layer.weight += left * 0.6 ** torch.arange(8) @ right.T
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=8, init="lora")
    controller = ra.RankController(adapters, ra.RankBudget(fraction=1.0), 60, method, **options)
    x = torch.randn(4000, 16, generator=generator)
    with torch.no_grad():
        y = teacher(x)

    def loss_of(step: int) -> torch.Tensor:
        part = slice(32 * step % 3000, 32 * step % 3000 + 32)
        return F.mse_loss(model(x[part]), y[part])

    train(controller, torch.optim.AdamW(adapters.parameters(), lr=1e-2), 60, loss_of)
    controller.finish()
    adapters.nested, adapters.nested_exponent = True, 0.0  # plain LoRA is cut alike
    found = []
    with torch.no_grad():
        for rank in (1, 2, 4, 8):
            with ra.at_rank(adapters, rank):
                found.append(F.mse_loss(model(x[3000:]), y[3000:]).item())
    return found


def test_its_first_triplets_are_better_than_those_of_plain_lora():
    plain = planted("uniform")
    for weights in WEIGHTS:
        own = planted("matryoshka", weights=weights)
        assert all(mine < theirs for mine, theirs in zip(own[:3], plain[:3], strict=True)), weights
        assert own[3] < own[2] < own[1] < own[0] and own[3] < 2 * plain[3]


def test_unknown_weights_are_told():
    with pytest.raises(ConfigError, match="did you mean 'root'"):
        trained("roots", steps=2)
