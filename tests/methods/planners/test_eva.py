"""EVA against PEFT's own, and what it makes of padding, shared inputs and batches that do not settle."""

from __future__ import annotations

import pytest
import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import nn

import rankalloc as ra
from rankalloc.errors import RankallocError
from rankalloc.methods.planners.eva import EVA
from rankalloc.methods.planners.incremental_pca import IncrementalPCA
from rankalloc.methods.planners.planning import layer_shapes
from rankalloc.methods.planners.probe import Probe, unchanged
from tests.support.batches import mlp_batches, token_batches
from tests.support.models import MAKERS, make_bert, make_llama, make_mlp


def uneven(make, seed):
    """A tiny model whose layers' inputs have falling spectra, some steeper than others."""
    model = make()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(5)
        for module in model.modules():
            if "Norm" in type(module).__name__:
                steep = torch.rand((), generator=generator).item() * 1.5
                order = torch.randperm(len(module.weight), generator=generator)
                module.weight.mul_(torch.logspace(0, -steep, len(order))[order])
    return model


def first_of_shared_inputs(model, names, batches):
    """{name: the first layer of those that get the same input}, as the planner found it."""
    planner, ranks = EVA(passes=1), dict.fromkeys(names, 1)
    with unchanged(model):
        planner.scores(Probe(model, {n: model.get_submodule(n) for n in names}, batches, ranks), lambda _: ranks)
    return planner.first


@pytest.mark.parametrize(("seed", "rank"), [(0, 4), (1, 2)])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_ranks_and_start_are_those_of_peft(make, seed, rank):
    """Equal ranks for every layer, but among layers of one input, whose scores are tied: there PEFT hands out
    the odd rank by an unstable sort and swaps. Their ranks are equal as a set, and the first layer's (which is
    the highest) by itself."""
    model, batches = uneven(make, seed), token_batches(3, rows=24, seed=seed)
    names = [shape.name for shape in layer_shapes(model, 2 * rank)]
    config = LoraConfig(r=rank, target_modules=names, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    theirs = get_eva_state_dict(model, batches, config, show_progress_bar=False)
    plan = ra.plan_ranks(model, batches, ra.RankBudget(ranks=rank * len(names)), "eva", rank=2 * rank)
    first = first_of_shared_inputs(model, names, batches)
    for leader in dict.fromkeys(first.values()):
        members = [name for name in names if first[name] == leader]
        assert sorted(plan[name] for name in members) == sorted(len(theirs[name]) for name in members)
        assert plan[leader] == len(theirs[leader]) == max(plan[name] for name in members)
    assert len(set(plan.values())) > 1 and not plan.notes
    for name in names:
        shared = min(plan[name], len(theirs[name]))
        if shared:
            torch.testing.assert_close(plan.factors[name].Q[:shared], theirs[name][:shared].float(), rtol=0, atol=1e-4)


def test_adapters_begin_with_the_components_and_at_no_update():
    model = uneven(make_bert, 0)
    plan = ra.plan_ranks(model, token_batches(), ra.RankBudget(ranks=30), "eva", rank=8)
    adapters = ra.attach(model, ranks=plan)
    assert adapters.init == "lora" and adapters.rank == 8 and adapters.scaling == 2.0
    for name, adapter in adapters.modules.items():
        assert adapter.rank == plan[name] and not adapter.delta_weight().any() and (adapter.lam == 1).all()
        torch.testing.assert_close(adapter.Q @ adapter.Q.T, torch.eye(plan[name]), rtol=0, atol=1e-4)


def test_layers_of_one_tensor_share_their_components_and_count_one_by_one():
    for make, groups in ((make_bert, 4), (make_llama, 4)):
        model = make()
        names = [shape.name for shape in layer_shapes(model, 4)]
        first = first_of_shared_inputs(model, names, token_batches(1))
        assert len(set(first.values())) == 2 * groups
        assert all(first[name].replace("query", "x") == name.replace("key", "x") for name in names if ".key" in name)
    plan = ra.plan_ranks(uneven(make_bert, 0), token_batches(), ra.RankBudget(ranks=30), "eva", rank=8)
    for block in range(2):
        ranks = [plan[f"bert.encoder.layer.{block}.attention.self.{part}"] for part in ("query", "key", "value")]
        assert max(ranks) - min(ranks) <= 1


class Twice(nn.Module):
    """Two layers with equal inputs that are not one tensor, and two with one that was written to in between."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        copy = x.clone()
        out = self.a(x) + self.b(copy)
        copy += 1
        return out + self.c(copy) + self.d(input=copy)


def test_inputs_are_told_apart_by_identity_not_by_value():
    model = Twice()
    first = first_of_shared_inputs(model, list(dict(model.named_children())), [torch.randn(9, 16)])
    assert first == {"a": "a", "b": "b", "c": "c", "d": "c"}


def test_padding_and_ignored_labels_are_not_looked_at():
    def plan(batches):
        return ra.plan_ranks(uneven(make_bert, 0), batches, ra.RankBudget(ranks=20), "eva", rank=4)

    plain = plan(token_batches())
    assert any(not (b["labels"] == -100)[b["attention_mask"].bool()].all() for b in token_batches())
    padded = token_batches()
    for batch in padded:
        hidden = batch["attention_mask"] == 0
        batch["input_ids"][hidden] = 7
        batch["labels"][hidden] = 0
    again = plan(padded)
    assert again == plain
    for name, factors in plain.factors.items():
        torch.testing.assert_close(factors.Q, again.factors[name].Q, rtol=0, atol=1e-4)
    unmasked = [{**b, "labels": b["labels"].clamp(min=0)} for b in token_batches()]
    other = plan(unmasked)
    both = plain.factors.keys() & other.factors.keys()
    assert any(not torch.allclose(plain.factors[n].Q[0], other.factors[n].Q[0], atol=1e-3) for n in both)


def test_components_are_those_of_all_rows_at_once():
    rows = torch.randn(90, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 12) + 3
    pca = IncrementalPCA(4, 0.99)
    for piece in (rows[:40], rows[40:43], rows[43:70], rows[70:]):
        pca.take_in(piece)
    used = torch.cat([rows[:40], rows[43:]])  # three rows are fewer than four components
    _, values, vectors = torch.linalg.svd(used - used.mean(0), full_matrices=False)
    torch.testing.assert_close(pca.components.float().abs(), vectors[:4].abs(), rtol=0, atol=2e-2)
    expected = (values.square() / values.square().sum())[:4]
    torch.testing.assert_close(pca.ratios.float(), expected, rtol=1e-2, atol=1e-6)
    assert pca.converged.shape == (4,) and (pca.components.gather(1, pca.components.abs().argmax(1)[:, None]) > 0).all()


def test_components_that_still_move_are_noted_and_batches_that_are_too_small_refused():
    plan = ra.plan_ranks(make_bert(), token_batches(2), ra.RankBudget(ranks=12), "eva", rank=4, tau=1.0, passes=1)
    assert sum(plan.values()) == 12 and "still moved after 1 passes over 2 batches" in plan.notes[0]
    with pytest.raises(RankallocError, match="larger batches"):
        ra.plan_ranks(make_mlp(), [(x[:3], y[:3]) for x, y in mlp_batches()], ra.RankBudget(ranks=6), "eva", rank=4)


def test_an_input_that_never_varies_gets_no_rank_before_the_others():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model.forward = lambda x: model["a"](x) + model["b"](torch.ones_like(x))
    plan = ra.plan_ranks(model, [x for x, _ in mlp_batches()], ra.RankBudget(ranks=4), "eva", rank=4)
    assert plan == {"a": 4, "b": 0}


def test_inputs_that_are_not_finite_are_named():
    batches = [torch.full((8, 16), float("nan"))] * 2
    with pytest.raises(RankallocError, match="inputs of 0 are not finite"):
        ra.plan_ranks(make_mlp(), batches, ra.RankBudget(ranks=4), "eva", rank=4)
