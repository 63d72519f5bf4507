"""Ranks chosen when a Trainer begins; resumed runs keep them."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

import rankalloc as ra
from rankalloc.errors import BudgetError, ConfigError
from rankalloc.methods.planners.planning import first_batches
from rankalloc.training import callback as callback_module
from tests.support.models import assert_same, make_bert, tensors_of, token_data
from tests.support.training import make_trainer

BUDGET = ra.RankBudget(fraction=0.4, every=2)


class FirstStep(TrainerCallback):
    """What the adapters hold, and the optimizer with them, before the first step."""

    def __init__(self, adapters):
        self.adapters = adapters

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 0:
            self.held = {name: adapter.rank for name, adapter in self.adapters.modules.items()}
            self.start = {name: (a.P.clone(), a.Q.clone()) for name, a in self.adapters.modules.items()}
            self.optimised = sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def begin(method="eva", init="lora", rank=6, **options):
    model = make_bert()
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=rank, init=init)
    return model, adapters, ra.RankCallback(adapters, BUDGET, method, **options)


@pytest.mark.parametrize(("method", "init"), [("eva", "lora"), ("gora", "svd"), ("fim", "lora")])
def test_a_trainer_begins_at_the_planned_ranks_and_keeps_them(method, init, tmp_path):
    model, adapters, callback = begin(method, init)
    seen = FirstStep(adapters)
    make_trainer(model, tmp_path, [callback, seen], steps=4).train()
    batches = first_batches(token_data(), torch.utils.data.default_collate, 8)
    plan = ra.plan_ranks(make_bert(), batches, BUDGET, method, rank=6, seed=11)
    assert seen.held == dict(plan) == adapters.ranks()
    asked = 0.4 * 6 * sum(shape.params_per_rank for shape in adapters.shapes())
    assert 0 <= asked - adapters.num_params() < max(shape.params_per_rank for shape in adapters.shapes())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert seen.optimised == trainable
    for name, factors in plan.factors.items():
        torch.testing.assert_close(seen.start[name][0], factors.P / adapters.scaling)
        torch.testing.assert_close(seen.start[name][1], factors.Q)
    assert adapters.scaling == 2.0 and callback.trace.final_ranks == list(plan.values())
    assert any(not torch.equal(a.P, seen.start[name][0]) for name, a in adapters.modules.items())
    trace = ra.RankTrace.load(tmp_path / "trace.json")
    assert trace.budget.target == trace.budget.initial == adapters.num_params()


def test_planning_leaves_the_order_of_the_data_alone(tmp_path):
    """The same batches come, and the same numbers are drawn, whether ranks were planned or given."""
    model, adapters, callback = begin("fim")
    make_trainer(model, tmp_path / "a", [callback], steps=6).train()
    ranks, other = adapters.ranks(), make_bert()
    torch.manual_seed(1)
    given = ra.attach(other, rank=6, init="lora")
    plan = ra.plan_ranks(make_bert(), None, None, "manual", rank=6, rank_pattern=ranks)
    budget = ra.RankBudget(ranks=sum(ranks.values()))
    again = ra.RankCallback(given, budget, "manual", rank_pattern=dict(plan))
    make_trainer(other, tmp_path / "b", [again], steps=6).train()
    assert_same(tensors_of(model), tensors_of(other))


def test_a_resumed_run_does_not_plan_again_and_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    settings = {"steps": 8, "save_strategy": "steps", "save_steps": 3}
    model, adapters, callback = begin("gora")
    make_trainer(model, tmp_path, [callback], **settings).train()
    again, resumed, callback_again = begin("gora")
    trainer = make_trainer(again, tmp_path, [callback_again], **settings)

    def never(*args, **kwargs):
        raise AssertionError("planned again")

    monkeypatch.setattr(callback_module, "plan_adapters", never)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(tensors_of(model), tensors_of(again))
    assert resumed.ranks() == adapters.ranks()
    assert callback_again.trace.final_ranks == callback.trace.final_ranks
    # and training on with a finished callback keeps them too
    trainer.train()
    assert resumed.ranks() == adapters.ranks()


def test_what_cannot_be_planned_is_told_before_training():
    with pytest.raises(BudgetError, match="above the 72"):
        ra.RankCallback(ra.attach(make_bert(), rank=6), ra.RankBudget(ranks=99), "eva")
    for options in ({"tua": 1}, {"placement": "foo"}, {"tau": 2}):
        with pytest.raises(ConfigError):
            begin(**options)
    with pytest.raises(ConfigError, match="its adapter holds 6"):
        ra.RankCallback(
            ra.attach(make_bert(), rank=6), ra.RankBudget(ranks=74), "manual", rank_pattern={"layer.0.*query": 8}
        )
