"""What every planner keeps: the model as it was, adapters or not; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BatchEncoding

import rankalloc as ra
from rankalloc.errors import ConfigError, RankallocError
from rankalloc.methods.planners import PLANNERS
from rankalloc.methods.planners.base import Planner
from rankalloc.training.planned import plan_adapters
from tests.support.batches import assert_unchanged, mlp_batches, state_of, token_batches
from tests.support.models import make_bert, make_gpt2, make_mlp

LOOKING = [m.name for m in ra.METHODS.values() if m.planner and PLANNERS[m.planner].needs_data]
BUDGET = ra.RankBudget(ranks=24)


@pytest.mark.parametrize("name", PLANNERS)
def test_a_planner_is_named_as_it_is_registered(name):
    assert PLANNERS[name].name == name and issubclass(PLANNERS[name], Planner)
    assert name in {method.planner for method in ra.METHODS.values()}


class Drawing(nn.Module):
    """A model that draws in evaluation mode too, and counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.inner = make_bert(dropout=0.1)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, **batch):
        torch.rand(3)
        self.calls += 1
        return self.inner(**batch)


@pytest.mark.parametrize("attached", [False, True], ids=["plain", "attached"])
@pytest.mark.parametrize("method", LOOKING)
def test_a_model_is_as_it_was(method, attached):
    model = Drawing().train()
    model.inner.bert.pooler = None
    model.inner.bert.encoder.layer[0].eval()
    next(model.parameters()).requires_grad_(False)
    adapters = ra.attach(model, rank=4, init="lora") if attached else None
    for parameter in list(model.parameters())[::3]:
        parameter.grad = torch.ones_like(parameter)
    before = state_of(model)
    if attached:
        plan_adapters(adapters, token_batches(2), BUDGET, method)
    else:
        ra.plan_ranks(model, iter(token_batches(2)), BUDGET, method, rank=4)
    assert_unchanged(before, state_of(model))


@pytest.mark.parametrize("init", ["lora", "svd"])
@pytest.mark.parametrize("method", LOOKING)
def test_adapters_at_their_start_are_planned_as_the_plain_model_is(method, init):
    plain = ra.plan_ranks(make_bert(), token_batches(2), BUDGET, method, rank=4, seed=3)
    attached = plan_adapters(ra.attach(make_bert(), rank=4, init=init), token_batches(2), BUDGET, method, seed=3)
    assert plain == attached and sum(plain.values()) == 24
    assert plain.factors.keys() == attached.factors.keys()
    for name, factors in plain.factors.items():
        torch.testing.assert_close(factors.P, attached.factors[name].P)
        torch.testing.assert_close(factors.Q, attached.factors[name].Q)


@pytest.mark.parametrize("method", LOOKING)
def test_conv1d_and_weights_in_half_width(method):
    batches = [{"input_ids": b["input_ids"], "labels": b["input_ids"]} for b in token_batches(2)]
    full = ra.plan_ranks(make_gpt2(), batches, BUDGET, method, rank=6)
    half = ra.plan_ranks(make_gpt2().bfloat16(), batches, BUDGET, method, rank=6)
    assert sum(full.values()) == sum(half.values()) == 24
    assert sum(abs(full[name] - half[name]) for name in full) <= 4


@pytest.mark.parametrize("method", LOOKING)
def test_ways_to_give_a_batch_are_one(method):
    given = token_batches(2)
    plan = ra.plan_ranks(make_bert(), given, BUDGET, method, rank=4)
    assert plan == ra.plan_ranks(make_bert(), map(BatchEncoding, given), BUDGET, method, rank=4)

    def loss_fn(outputs, labels):
        return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())

    assert plan == ra.plan_ranks(make_bert(), given, BUDGET, method, rank=4, loss_fn=loss_fn)
    budget = ra.RankBudget(ranks=6)
    pairs = ra.plan_ranks(make_mlp(), mlp_batches(), budget, method, rank=4, loss_fn=F.mse_loss)
    lists = ra.plan_ranks(make_mlp(), [[x, y] for x, y in mlp_batches()], budget, method, rank=4, loss_fn=F.mse_loss)
    assert pairs == lists and sum(pairs.values()) == 6
    alone = [x for x, _ in mlp_batches()]
    ra.plan_ranks(make_mlp(), alone, budget, method, rank=4, loss_fn=lambda y: y.square().mean())
    singles = [(x,) for x in alone]
    ra.plan_ranks(make_mlp(), singles, budget, method, rank=4, loss_fn=lambda y: y.square().mean())


def test_only_the_first_batches_are_looked_at():
    def endless():
        while True:
            yield from token_batches(3)

    plan = ra.plan_ranks(make_bert(), endless(), BUDGET, "fim", rank=4, max_batches=2)
    assert plan == ra.plan_ranks(make_bert(), token_batches(3)[:2], BUDGET, "fim", rank=4)
    assert plan.factors == {} and plan.notes == []


X = mlp_batches(1)[0][0]


@pytest.mark.parametrize(
    ("error", "batches", "loss_fn", "words"),
    [
        (ConfigError, None, F.mse_loss, "pass training batches, got None"),
        (ConfigError, [], F.mse_loss, "none at all"),
        (ConfigError, {"x": X}, F.mse_loss, r"pass \[batch\]"),
        (ConfigError, X, F.mse_loss, r"pass \[batch\]"),
        (ConfigError, mlp_batches(1), None, "pass loss_fn="),
        (ConfigError, [X], lambda y: y, "one element"),
        (ConfigError, [X], lambda y: 3.0, "got float"),
        (RankallocError, [X * float("nan")], lambda y: y.square().mean(), "the loss on batch 0 is nan"),
        (RankallocError, [X], lambda y: torch.ones(()), "does not depend on any layer"),
    ],
)
@pytest.mark.parametrize("method", ["gora", "fim", "gradient-share", "effective-rank"])
def test_what_cannot_be_planned_from_is_refused(method, error, batches, loss_fn, words):
    with pytest.raises(error, match=words) as caught:
        ra.plan_ranks(make_mlp(), batches, ra.RankBudget(ranks=4), method, rank=4, loss_fn=loss_fn)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["gora", "fim", "gradient-share", "effective-rank"])
def test_a_gradient_that_is_not_finite_is_refused(method):
    batches = [(X.clamp(min=0), None)]
    with pytest.raises(RankallocError, match="gradient of 0 .*not finite"):
        ra.plan_ranks(
            nn.Sequential(nn.Linear(16, 8)), batches, ra.RankBudget(ranks=2), method, rank=4,
            loss_fn=lambda y, _: (y * 0).sqrt().sum(),
        )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("eva", {"max_batches": 0}), ("eva", {"tau": 0}), ("eva", {"passes": 0}), ("gora", {"gamma": -1}),
        ("fim", {"tau": 0.9}), ("fim", {"placement": "nowhere"}), ("uniform", {"placement": "random"}),
    ],
)
def test_options_are_checked_before_data_is_looked_at(method, options):
    with pytest.raises(ConfigError):
        ra.plan_ranks(make_mlp(), None, ra.RankBudget(ranks=4), method, rank=4, **options)
