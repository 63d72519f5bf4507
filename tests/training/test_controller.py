"""The controller in a plain loop: the order of things, the exact end, and the trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import rankalloc as ra
from rankalloc.errors import BudgetError
from rankalloc.methods.allocators import ALLOCATORS, global_topk
from tests.support.models import assert_same, logits_of, make_mlp, tensors_of
from tests.support.training import BUDGET, STEPS, begin_mlp, train_mlp


@pytest.mark.parametrize(
    "budget",
    [
        ra.RankBudget(ranks=5, every=2), ra.RankBudget(ranks=0, every=3, freeze=0), ra.RankBudget(ranks=12),
        ra.RankBudget(params=230, every=2), ra.RankBudget(bytes=1100, every=3, min_rank=1),
        ra.RankBudget(fraction=0.5, every=2, max_rank=2),
        ra.RankBudget(ranks=6, every=1, multiple_of=2, shape="linear"),
        ra.RankBudget(ranks=4, shape="constant", warmup=0, freeze=0),
    ],
    ids=lambda b: f"{b.given}",
)
def test_every_allocation_meets_the_budget_and_the_last_one_stays(budget):
    model, adapters, controller, optimizer = begin_mlp(budget)
    train_mlp(model, controller, optimizer, STEPS)
    trace = controller.finish()
    plan, cheapest = controller.schedule, min(controller.schedule.costs) * controller.schedule.multiple_of
    assert [a.step for a in trace.allocations] == [s for s in range(1, STEPS + 1) if plan.allocates(s)]
    for record in trace.allocations:
        assert record.asked == min(plan.asked(record.step), plan.ceiling)
        assert record.reached == plan.spent(record.ranks) <= record.asked
        assert plan.unit != "ranks" or record.reached == record.asked
    last = trace.allocations[-1]
    assert last.asked == plan.target
    dear = max(plan.costs) * plan.multiple_of
    assert plan.target - last.reached < (cheapest if plan.unit == "ranks" else dear)
    assert list(adapters.ranks().values()) == last.ranks == [a.rank for a in adapters]
    assert trace.finished and trace.steps_done == STEPS and not trace.alerts
    assert trace.adapter_params_final == adapters.num_params() == sum(
        (a.d_in + a.d_out) * len(a.lam) for a in adapters
    )
    assert [len(v) for v in trace.singular_values] == last.ranks
    assert [(len(k), len(d)) for k, d in zip(trace.scores.kept, trace.scores.dropped, strict=True)] == [
        (r, 4 - r) for r in last.ranks
    ]


@pytest.mark.parametrize("budget", [ra.RankBudget(ranks=5, every=2), ra.RankBudget(params=100, every=2)], ids=str)
def test_scores_of_triplets_that_left_memory_stay_in_the_trace(budget):
    model, adapters, controller, optimizer = begin_mlp(budget, method="auto")
    train_mlp(model, controller, optimizer, STEPS)
    scores = controller.finish().scores
    assert any(scores.left) and any(any(s > 0 for s in layer) for layer in scores.left)
    for adapter, rank, *sides in zip(
        adapters, adapters.ranks().values(), scores.kept, scores.dropped, scores.left, strict=True
    ):
        assert len(sides[0]) == rank and sum(map(len, sides)) == adapter.initial_rank


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_tiny_runs_end_on_the_budget(steps):
    model, adapters, controller, optimizer = begin_mlp(steps=steps)
    train_mlp(model, controller, optimizer, steps)
    controller.finish()
    assert sum(adapters.ranks().values()) == 5
    assert ["short" in alert for alert in controller.trace.alerts] == [True] * (steps <= 3)


def test_held_at_zero_and_taken_out_of_memory_are_one_function():
    ended = []
    for shrink in (True, False):
        model, adapters, controller, optimizer = begin_mlp(shrink=shrink, orthogonal=0.5)
        train_mlp(model, controller, optimizer, STEPS)
        trace = controller.finish()
        held = [len(a.lam) for a in adapters]
        assert held == (list(adapters.ranks().values()) if shrink else [4] * len(adapters))
        ended.append((adapters.ranks(), [a.ranks for a in trace.allocations], logits_of(model), trace.singular_values))
    assert ended[0][0] == ended[1][0] and ended[0][1] == ended[1][1]
    assert sum(ended[0][0].values()) == 5 and 0 < min(len(v) for v in ended[0][3]) < 4
    torch.testing.assert_close(ended[0][2], ended[1][2], rtol=1e-5, atol=1e-6)


def test_dropped_triplets_stay_dropped_after_the_freeze_whatever_momentum_does():
    model, adapters, controller, optimizer = begin_mlp(shrink=False)
    train_mlp(model, controller, optimizer, STEPS)
    assert all(not a.lam[~a.kept].any() and a.lam[a.kept].all() for a in adapters)


def test_a_dropped_triplet_may_come_back():
    model, adapters, controller, optimizer = begin_mlp(ra.RankBudget(ranks=6, every=1, shape="constant"), steps=60)
    train_mlp(model, controller, optimizer, 60)
    assert sum(a.returned for a in controller.trace.allocations) > 0
    churn = [(a.dropped, a.returned) for a in controller.trace.allocations]
    live = 12
    for (dropped, returned), record in zip(churn, controller.trace.allocations, strict=True):
        live += returned - dropped
        assert live == sum(record.ranks)


def test_what_the_budget_at_its_end_would_keep_is_never_dropped(monkeypatch):
    """Ranks of unlike cost: dear ranks that a larger budget affords must not drive out what the rest of the final
    budget can still buy."""
    asked = []

    def spy(scores, demand):
        asked.append((scores, demand, global_topk.allocate(scores, demand)))
        return asked[-1][2]

    monkeypatch.setitem(ALLOCATORS, "global", spy)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(*sides) for sides in ((12, 48), (48, 12), (12, 12), (12, 12))])
    adapters = ra.attach(model, rank=4)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=1e-2)
    controller = ra.RankController(adapters, ra.RankBudget(params=144, warmup=0, every=2), STEPS)
    would_have_dropped = 0
    for step in range(1, STEPS + 1):
        model(torch.randn(8, 12)).square().mean().backward()
        controller.observe()
        optimizer.step()
        asked.clear()
        controller.update(optimizer)
        optimizer.zero_grad()
        if asked:
            scores, demand, kept = asked[-1]
            open_demand = replace(demand, floors=(0,) * 4)
            end = global_topk.allocate(scores, replace(open_demand, amount=controller.schedule.target))
            assert all((~wanted | mask).all() for wanted, mask in zip(end, kept, strict=True)), step
            alone = global_topk.allocate(scores, open_demand)
            would_have_dropped += any((wanted & ~mask).any() for wanted, mask in zip(end, alone, strict=True))
    assert would_have_dropped  # else this test could not fail
    assert controller.finish().adapter_params_final == 144


def test_the_same_seed_gives_the_same_run():
    runs = []
    for _ in range(2):
        model, adapters, controller, optimizer = begin_mlp()
        train_mlp(model, controller, optimizer, STEPS)
        trace = controller.finish()
        runs.append((tensors_of(model), [a.model_dump() for a in trace.allocations], trace.scores))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_train_to_the_budget(dtype):
    model = make_mlp()
    adapters = ra.attach(model, rank=4)
    model.to(dtype)
    controller = ra.RankController(adapters, BUDGET, STEPS, "adalora")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    for seed in range(STEPS):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
        (model(x) - x[:, :8].sin()).square().mean().backward()
        controller.observe()
        optimizer.step()
        controller.update(optimizer)
        optimizer.zero_grad()
    controller.finish()
    assert sum(adapters.ranks().values()) == 5 and adapters.modules["0"].P.dtype == dtype


def test_the_trace_is_written_where_asked(tmp_path):
    model, adapters, controller, optimizer = begin_mlp(seed=7)
    controller.log(0, {"loss": np.float32(1.5), "nan": float("nan"), "flag": True, "text": "x"})
    train_mlp(model, controller, optimizer, STEPS)
    trace = controller.finish(tmp_path / "run")
    again = ra.RankTrace.load(tmp_path / "run" / "trace.json")
    assert again.allocations == trace.allocations and again.seed == 7
    assert [log.values for log in again.logs] == [{"loss": 1.5}]
    assert again.final_ranks == list(adapters.ranks().values())
    assert again.allocator_state_bytes == 2 * 4 * sum((a.d_in + a.d_out + 1) * 4 for a in adapters)
    assert again.budget.given == {"ranks": 5} and again.alpha == 8.0 and again.scaling == 2.0


@pytest.mark.parametrize("given", [{"params": 3}, {"bytes": 100}])
def test_a_budget_that_buys_no_rank_is_refused(given):
    with pytest.raises(BudgetError, match="buys no rank"):
        begin_mlp(ra.RankBudget(**given))
