"""Plain LoRA under every method, through both doors: adapters of our own, and a PeftModel's layers driven in place."""

from __future__ import annotations

import copy

import pytest
import torch

import rankalloc as ra
from tests.support.models import assert_same, make_mlp, tensors_of
from tests.support.peft_models import peft_mlp
from tests.support.training import train_mlp

STEPS = 12
METHODS = [name for name, method in ra.METHODS.items() if method.when == "during" and method.init == "svd"]
REFUSED = [name for name, method in ra.METHODS.items() if method.when == "during" and method.init != "svd"]


def attached():
    model = make_mlp()
    torch.manual_seed(1)
    return model, ra.attach(model, rank=4, alpha=4, init="lora")


def adopted():
    model = peft_mlp()
    return model, ra.adopt(model)


DOORS = {"attach": attached, "adopt": adopted}


def begin(door, method, budget, optimizer=torch.optim.AdamW, **options):
    model, adapters = DOORS[door]()
    controller = ra.RankController(adapters, budget, STEPS, method, seed=3, **options)
    return model, adapters, optimizer(adapters.parameters(), lr=1e-2), controller


@pytest.mark.parametrize("unit", [{"ranks": 5}, pytest.param({"params": 230}, marks=pytest.mark.long)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("door", DOORS)
def test_the_budget_is_met_and_a_stop_in_the_middle_changes_nothing(door, method, unit):
    budget = ra.RankBudget(**unit, every=2)
    model, adapters, optimizer, controller = begin(door, method, budget)
    train_mlp(model, controller, optimizer, 7)
    saved = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
    state = controller.state_dict()
    state = {"meta": state["meta"], "tensors": {k: v.clone() for k, v in state["tensors"].items()}}
    train_mlp(model, controller, optimizer, STEPS)
    trace = controller.finish()
    plan = controller.schedule
    spent = plan.spent(list(adapters.ranks().values()))
    assert trace.final_ranks == list(adapters.ranks().values()) == [a.rank for a in adapters]
    assert 0 <= plan.target - spent < max(plan.costs) and (plan.unit != "ranks" or spent == 5)
    assert any(a.delta_weight().abs().max() > 1e-3 for a in adapters)

    again, _, optimizer, controller = begin(door, method, budget)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    controller.load_state_dict(state)
    train_mlp(again, controller, optimizer, STEPS)
    assert_same(tensors_of(model), tensors_of(again))


@pytest.mark.parametrize("shrink", ["freeze", False])
@pytest.mark.parametrize("method", ["auto", "adalora", "elalora"])
def test_driven_layers_end_the_same_whenever_ranks_leave_memory(method, shrink):
    model, adapters, optimizer, controller = begin("adopt", method, ra.RankBudget(ranks=5, every=2), shrink=shrink)
    train_mlp(model, controller, optimizer, STEPS)
    controller.finish()
    assert sum(adapters.ranks().values()) == 5
    assert [a.rank for a in adapters] == ([4, 4, 4] if shrink is False else list(adapters.ranks().values()))
    for adapter in adapters:
        assert not adapter.P[:, ~adapter.kept].any()


@pytest.mark.parametrize("method", REFUSED)
def test_a_method_that_layers_of_peft_cannot_train_is_refused_by_name(method):
    with pytest.raises(ra.RankallocError, match=f"{method}.*attach"):
        ra.RankController(adopted()[1], ra.RankBudget(ranks=5), STEPS, method)


@pytest.mark.parametrize("method", ["auto", "singular-value", "first-order", "fisher", "gradient-norm", "adalora"])
def test_both_doors_do_the_same_arithmetic(method):
    """From the same start: the same ranks, and the same updates within the rounding of another order of products."""
    budget = ra.RankBudget(ranks=5, every=2)
    one, ours, optimizer, controller = begin("attach", method, budget)
    other, theirs, its_optimizer, its_controller = begin("adopt", method, budget)
    with torch.no_grad():
        for adapter, driven in zip(ours, theirs, strict=True):
            driven.Q.copy_(adapter.Q)
    train_mlp(one, controller, optimizer, STEPS)
    train_mlp(other, its_controller, its_optimizer, STEPS)
    assert ours.ranks() == theirs.ranks() and ours.scaling == theirs.scaling
    for adapter, driven in zip(ours, theirs, strict=True):
        torch.testing.assert_close(driven.delta_weight(), adapter.delta_weight(), rtol=1e-3, atol=1e-5)
