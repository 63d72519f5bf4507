"""Layers that never get a gradient are named, and cost no budget."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankalloc as ra
from tests.support.models import make_mlp
from tests.support.training import train


class WithSpares(nn.Module):
    """A network with a branch that its data never takes, a layer that it never calls, and one whose weight it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.branch, self.never, self.read = make_mlp(), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.get_submodule("read").weight  # in a way that no search of the source finds
        return self.main(x) @ weight.T + (0 if other is None else self.branch(other))


IDLE = ["branch", "never", "read"]


def begin(method: str, **options):
    torch.manual_seed(0)
    model = WithSpares()
    adapters = ra.attach(model, rank=4)
    budget = ra.RankBudget(fraction=0.75, every=2)
    controller = ra.RankController(adapters, budget, 8, method, **options)
    return model, adapters, controller, torch.optim.AdamW(adapters.parameters(), lr=1e-2)


def go_on(model, controller, optimizer, steps):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    train(controller, optimizer, steps, lambda step: model(x).square().mean(), lambda step: None)


@pytest.mark.parametrize("method, options", [
    ("auto", {}), ("adalora", {}), ("singular-value", {"placement": "uniform"}), ("fisher", {"placement": "random"}),
])
def test_they_get_no_ranks_and_are_named(method, options):
    model, adapters, controller, optimizer = begin(method, **options)
    assert controller.state.idle == [*adapters.modules]
    go_on(model, controller, optimizer, 8)
    trace = controller.finish(optimizer=optimizer)
    ranks = adapters.ranks()
    assert [ranks[name] for name in IDLE] == [0, 0, 0]
    # three quarters of 24 ranks were asked for, and the layers that learned have room for 12
    assert sum(ranks.values()) == 12
    assert [alert for alert in trace.alerts if "never got a gradient" in alert] == [
        "3 of 6 adapted layers never got a gradient (branch, never, read): nothing in the training data reaches them, "
        "or the model never calls them, so they got no ranks; leave them out with exclude_modules"
    ]


def test_a_layer_that_is_reached_before_the_first_allocation_is_not_idle():
    model, adapters, controller, optimizer = begin("auto")
    x = torch.randn(4, 16)
    train(controller, optimizer, 8, lambda step: model(x, x if step == 1 else None).square().mean(), lambda step: None)
    assert controller.state.idle == ["never", "read"] and adapters.ranks()["branch"] > 0


def test_a_resumed_run_knows_which_were_reached():
    whole = begin("auto")
    x = torch.randn(4, 16)
    train(whole[2], whole[3], 1, lambda step: whole[0](x, x).square().mean(), lambda step: None)
    saved = copy.deepcopy([part.state_dict() for part in (whole[0], whole[2], whole[3])])
    resumed = begin("auto")
    for part, state in zip((resumed[0], resumed[2], resumed[3]), saved, strict=True):
        part.load_state_dict(state)
    assert resumed[2].state.idle == ["never", "read"]
    for model, _, controller, optimizer in (whole, resumed):
        go_on(model, controller, optimizer, 8)
    assert whole[1].ranks() == resumed[1].ranks() and whole[1].ranks()["branch"] > 0


def test_ranks_chosen_before_training_are_told_to_be_of_no_use():
    torch.manual_seed(0)
    model = WithSpares()
    adapters = ra.attach(model, ranks=ra.plan_ranks(model, None, ra.RankBudget(ranks=6), rank=4))
    controller = ra.RankController(adapters, ra.RankBudget(ranks=6), 4, "uniform")
    go_on(model, controller, torch.optim.AdamW(adapters.parameters(), lr=1e-2), 4)
    assert any("so their ranks are of no use" in alert for alert in controller.finish().alerts)
