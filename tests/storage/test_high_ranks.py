"""PEFT allows ranks above the shorter side of a layer; such adapters load as the same update, at full rank."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankalloc as ra
from rankalloc.storage import plain_lora
from rankalloc.storage.layout import Layout
from tests.support.adapter_folders import dense, random_layers, write_peft
from tests.support.models import logits_of, make_bert, make_mlp, token_data

peft = pytest.importorskip("peft")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Odd(nn.Module):
    """An embedding, a convolution with and one without groups, and a linear layer: each has a side below 16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 24, padding_idx=0)
        self.plain, self.grouped = nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 6, 3, groups=2, padding=1)
        self.out = nn.Linear(36, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids).reshape(len(ids), 4, 6)
        return self.out(torch.tanh(self.grouped(torch.tanh(self.plain(x)))).flatten(1))


def odd_logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(11).reshape(-1, 1)).clone()


def by_peft(model: nn.Module, folder, **config) -> nn.Module:
    """A PEFT model with visibly trained weights, saved to ``folder``."""
    theirs = peft.get_peft_model(model, peft.LoraConfig(**config))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(
    "options",
    [
        {"r": 40}, {"r": 40, "use_rslora": True}, {"r": 2, "rank_pattern": {"0": 30}},
        {"r": 33, "rank_pattern": {"2": 3}, "alpha_pattern": {"4": 5}},
    ],
    ids=["all layers", "rslora", "one by a pattern", "all but one"],
)
def test_linear_layers_load_at_full_rank(options, tmp_path):
    theirs = by_peft(make_mlp(), tmp_path, lora_alpha=12, target_modules=["0", "2", "4"], **options)
    ours = make_mlp()
    adapters = ra.load(ours, tmp_path)
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), **CLOSE)
    ranks = {"0": options["r"], "2": options["r"], "4": options["r"], **options.get("rank_pattern", {})}
    assert adapters.ranks() == {name: min(ranks[name], a.d_in, a.d_out) for name, a in adapters.modules.items()}
    again = make_mlp()
    ra.load(again, ra.save(adapters, tmp_path / "again"))
    torch.testing.assert_close(logits_of(again), logits_of(theirs), **CLOSE)
    ra.merge(adapters)
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), **CLOSE)


@pytest.mark.parametrize("layer", ["embedding", "plain", "out"])
def test_other_layers_do_too(layer, tmp_path):
    theirs = by_peft(Odd(), tmp_path, r=40, lora_alpha=12, target_modules=[layer])
    ours = Odd()
    adapters = ra.load(ours, tmp_path)
    torch.testing.assert_close(odd_logits(ours), odd_logits(theirs), **CLOSE)
    assert (odd_logits(ours) - odd_logits(Odd())).abs().max() > 1e-2
    assert adapters.ranks()[layer] == min(adapters.modules[layer].d_in, adapters.modules[layer].d_out)


def test_a_grouped_convolution_does_too(tmp_path):
    # padded with zeros where the file of rank 3 ends, then filled: rank 10 of a weight (6, 9)
    model = Odd()
    adapters = ra.attach(model, rank=3, target_modules=["grouped"], init="lora")
    with torch.no_grad():
        adapters.modules["grouped"].P.normal_(generator=torch.Generator().manual_seed(1))
    lora = plain_lora.read(ra.save(adapters, tmp_path / "low"))
    a, b = lora.pairs["grouped"]
    halves = a.unflatten(0, (2, 3)).repeat(1, 4, 1, 1).flatten(0, 1)
    lora.pairs["grouped"] = halves, b.repeat(1, 4, 1) / 4
    plain_lora.write(lora, tmp_path / "high", Layout())
    ours = Odd()
    loaded = ra.load(ours, tmp_path / "high")
    assert loaded.ranks() == {"grouped": 6}
    torch.testing.assert_close(odd_logits(ours), odd_logits(model), **CLOSE)


def test_an_adalora_too(tmp_path):
    layers = {name: (torch.randn(9, 16), torch.randn(24, 9)) for name in ("0",)} | {
        "4": (torch.randn(9, 24), torch.randn(8, 9))
    }
    write_peft(tmp_path, layers, peft_type="ADALORA", init_r=9, rank_pattern=None)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key.removesuffix(".weight"): value for key, value in load_file(file).items()}
    tensors |= {f"base_model.model.{name}.lora_E": torch.randn(9, 1) for name in layers}
    save_file(tensors, file)
    adapters = ra.load(make_mlp(), tmp_path)
    assert adapters.ranks() == {"0": 9, "4": 8}
    stored = ra.FinishedAdapter(tmp_path).stored("4")
    torch.testing.assert_close(adapters.modules["4"].delta_weight().double(), stored.dense(), rtol=1e-5, atol=1e-5)


def test_half_precision_loses_nothing_more(tmp_path):
    shapes = {name: (torch.randn(30, 16), torch.randn(24, 30)) for name in ("0",)}
    write_peft(tmp_path, shapes, dtype=torch.bfloat16)
    delta = ra.load(make_mlp(), tmp_path).modules["0"].delta_weight()
    torch.testing.assert_close(delta.double(), dense(tmp_path)["0"], rtol=1e-5, atol=1e-5)


def test_ranks_up_to_full_are_loaded_as_they_are(tmp_path):
    layers = {"0": (torch.randn(16, 16), torch.randn(24, 16))}
    adapter = ra.load(make_mlp(), write_peft(tmp_path, layers)).modules["0"]
    assert torch.equal(adapter.Q.detach(), layers["0"][0]) and torch.equal(adapter.P.detach(), layers["0"][1])


@pytest.mark.parametrize("inputs_only", [False, True])
def test_they_can_be_calibrated_for(inputs_only, tmp_path):
    """A shrink weighed by moments that were measured at full rank is the one weighed by the whole moments."""
    by_peft(make_bert(), tmp_path / "a", r=40, lora_alpha=12, target_modules=["query", "dense"])
    rows = token_data(16)
    batches = [{key: torch.stack([row[key] for row in rows]) for key in rows[0]}]
    measured = ra.calibrate(make_bert(), tmp_path / "a", batches, inputs_only=inputs_only)
    model = make_bert()
    adapters = ra.load(model, tmp_path / "a")
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, adapter in adapters.modules.items():
        def watch(_module, args, out, name=name):
            x = args[0].detach().flatten(0, -2).double()
            inputs[name] = x.T @ x / len(x)

            def seen(gradient):
                g = gradient.flatten(0, -2).double()
                outputs[name] = g.T @ g / len(g)

            out.register_hook(seen)
        adapter.register_forward_hook(watch)
    model(**batches[0]).loss.backward()
    by_hand = ra.KroneckerMetric(inputs, {} if inputs_only else outputs)
    budget = ra.RankBudget(fraction=0.3)
    one = ra.shrink(tmp_path / "a", budget, tmp_path / "one", metric=measured)
    two = ra.shrink(tmp_path / "a", budget, tmp_path / "two", metric=by_hand)
    assert one.ranks == two.ranks
    for ours, theirs in zip(one.layers, two.layers, strict=True):
        assert ours.metric_error == pytest.approx(theirs.metric_error, rel=1e-3)
        assert ours.error == pytest.approx(theirs.error, rel=1e-3)
    other = write_peft(tmp_path / "other", random_layers(1, count=1))
    with pytest.raises(ra.RankallocError, match="another adapter"):
        ra.shrink(other, ra.RankBudget(ranks=1), metric=measured)
