"""The controller in a plain loop: the order of things, the exact end, and everything that can go wrong."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

import rankalloc as ra
from rankalloc.errors import BudgetError, ConfigError, NotAdaptedError, RankallocError
from tests.support.models import assert_same, logits_of, make_mlp, tensors_of
from tests.support.training import train_mlp

STEPS = 20
BUDGET = ra.RankBudget(ranks=5, every=2)


def begin(budget=BUDGET, rank=4, steps=STEPS, optimizer=torch.optim.AdamW, attach=None, **options):
    model = make_mlp()
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=rank, **(attach or {}))
    controller = ra.RankController(adapters, budget, total_steps=steps, **{"method": "adalora", **options})
    return model, adapters, controller, optimizer(adapters.parameters(), lr=1e-2)


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
    model, adapters, controller, optimizer = begin(budget)
    train_mlp(model, controller, optimizer, STEPS)
    trace = controller.finish()
    plan, cheapest = controller.plan, min(controller.plan.costs) * controller.plan.multiple_of
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
    model, adapters, controller, optimizer = begin(budget, method="auto")
    train_mlp(model, controller, optimizer, STEPS)
    scores = controller.finish().scores
    assert any(scores.left) and any(any(s > 0 for s in layer) for layer in scores.left)
    for adapter, rank, *sides in zip(
        adapters, adapters.ranks().values(), scores.kept, scores.dropped, scores.left, strict=True
    ):
        assert len(sides[0]) == rank and sum(map(len, sides)) == adapter.initial_rank


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_tiny_runs_end_on_the_budget(steps):
    model, adapters, controller, optimizer = begin(steps=steps)
    train_mlp(model, controller, optimizer, steps)
    controller.finish()
    assert sum(adapters.ranks().values()) == 5 and not controller.trace.alerts


def test_held_at_zero_and_taken_out_of_memory_are_one_function():
    ended = []
    for shrink in (True, False):
        model, adapters, controller, optimizer = begin(shrink=shrink, orthogonal=0.5)
        train_mlp(model, controller, optimizer, STEPS)
        trace = controller.finish()
        held = [len(a.lam) for a in adapters]
        assert held == (list(adapters.ranks().values()) if shrink else [4] * len(adapters))
        ended.append((adapters.ranks(), [a.ranks for a in trace.allocations], logits_of(model), trace.singular_values))
    assert ended[0][0] == ended[1][0] and ended[0][1] == ended[1][1]
    assert sum(ended[0][0].values()) == 5 and 0 < min(len(v) for v in ended[0][3]) < 4
    torch.testing.assert_close(ended[0][2], ended[1][2], rtol=1e-5, atol=1e-6)


def test_dropped_triplets_stay_dropped_after_the_freeze_whatever_momentum_does():
    model, adapters, controller, optimizer = begin(shrink=False)
    train_mlp(model, controller, optimizer, STEPS)
    assert all(not a.lam[~a.kept].any() and a.lam[a.kept].all() for a in adapters)


def test_a_dropped_triplet_may_come_back():
    model, adapters, controller, optimizer = begin(ra.RankBudget(ranks=6, every=1, shape="constant"), steps=60)
    train_mlp(model, controller, optimizer, 60)
    assert sum(a.returned for a in controller.trace.allocations) > 0
    churn = [(a.dropped, a.returned) for a in controller.trace.allocations]
    live = 12
    for (dropped, returned), record in zip(churn, controller.trace.allocations, strict=True):
        live += returned - dropped
        assert live == sum(record.ranks)


def test_the_same_seed_gives_the_same_run():
    runs = []
    for _ in range(2):
        model, adapters, controller, optimizer = begin()
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


# --- gradients that are not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_without_finite_gradients_is_left_out_of_the_scores(bad):
    """The same run, with one observation poisoned and with that observation skipped."""
    ended = []
    for poison in (True, False):
        model, adapters, controller, optimizer = begin()

        def meddle(step, adapters=adapters, controller=controller, poison=poison):
            if step != 4:
                if controller.score is not None:
                    vars(controller.score).pop("observe", None)
                return
            for p in adapters.parameters():
                p.grad.zero_()  # the optimizer sees the same in both runs; only what is observed differs
            if poison:
                adapters.modules["2"].Q.grad[0, 0] = bad
            else:
                controller.score.observe = lambda: None

        def clean(optimizer=optimizer, adapters=adapters):
            for p in adapters.parameters():
                if p.grad is not None:
                    p.grad.nan_to_num_(0.0, 0.0, 0.0)

        optimizer.register_step_pre_hook(lambda *_, clean=clean: clean())
        controller.orthogonal = 0.0
        train_mlp(model, controller, optimizer, STEPS, before_observe=meddle)
        trace = controller.finish()
        ended.append((tensors_of(model), trace.scores, trace.nonfinite_steps))
    assert_same(ended[0][0], ended[1][0])
    assert ended[0][1] == ended[1][1]
    assert (ended[0][2], ended[1][2]) == ([4], [])


def test_weights_that_are_no_numbers_any_more_are_told_and_the_trace_survives(tmp_path):
    model, adapters, controller, optimizer = begin()
    train_mlp(model, controller, optimizer, STEPS)
    next(a for a in adapters if a.rank).P.data[0, 0] = float("nan")
    trace = controller.finish(tmp_path)
    assert "not finite" in trace.alerts[-1]
    assert ra.RankTrace.load(tmp_path / "trace.json").finished


# --- what is asked for must happen -----------------------------------------------------------------------------


def test_update_without_observe_is_an_error():
    model, adapters, controller, optimizer = begin()
    model(torch.randn(2, 16)).sum().backward()
    with pytest.raises(NotAdaptedError, match="without observe"):
        controller.update(optimizer)
    controller.observe()
    controller.update(optimizer)
    with pytest.raises(NotAdaptedError, match="without observe"):
        controller.update(optimizer)


def test_observe_without_gradients_is_an_error():
    model, adapters, controller, optimizer = begin()
    with pytest.raises(NotAdaptedError, match="no adapter received a gradient"):
        controller.observe()


def test_finish_without_a_step_is_an_error(tmp_path):
    _, adapters, controller, _ = begin()
    for act in (controller.finish, lambda: ra.save(adapters, tmp_path / "a"), lambda: ra.merge(adapters)):
        with pytest.raises(NotAdaptedError, match="never were"):
            act()
    assert not list(tmp_path.iterdir())


def test_an_optimizer_from_before_attach_is_an_error_at_the_first_step():
    model = make_mlp()
    early = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = ra.RankController(ra.attach(model, rank=4), BUDGET, STEPS)
    with pytest.raises(NotAdaptedError, match="after rankalloc.attach"):
        train_mlp(model, controller, early, STEPS)
    assert controller.step == 0


def test_an_update_without_the_optimizer_is_an_error_unless_shapes_stay():
    model, _, controller, _ = begin()
    model(torch.randn(2, 16)).sum().backward()
    controller.observe()
    with pytest.raises(NotAdaptedError, match="shrink=False"):
        controller.update()
    model, _, controller, _ = begin(shrink=False)
    model(torch.randn(2, 16)).sum().backward()
    controller.observe()
    controller.update()
    assert controller.step == 1


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_an_early_stop_is_brought_to_the_budget_and_said(with_optimizer):
    model, adapters, controller, optimizer = begin()
    train_mlp(model, controller, optimizer, 6)
    trace = controller.finish(optimizer=optimizer if with_optimizer else None)
    assert sum(adapters.ranks().values()) == 5
    assert len(trace.alerts) == 1 and "after step 6, before the freeze at step 14" in trace.alerts[0]
    assert (trace.allocations[-1].step, trace.allocations[-1].asked, trace.steps_done) == (6, 5, 6)
    assert ({a.rank for a in adapters} == {4}) != with_optimizer


@pytest.mark.parametrize("steps", [6, STEPS])
def test_finishing_twice_changes_nothing(steps):
    model, adapters, controller, optimizer = begin()
    train_mlp(model, controller, optimizer, steps)
    first = copy.deepcopy(controller.finish(optimizer=optimizer))
    second = controller.finish(optimizer=optimizer)
    assert first.model_dump(exclude={"wall_seconds"}) == second.model_dump(exclude={"wall_seconds"})


def test_a_second_run_on_adapters_that_shrank_keeps_their_ranks():
    model, adapters, controller, optimizer = begin(ra.RankBudget(params=230, every=2))
    train_mlp(model, controller, optimizer, STEPS)
    controller.finish()
    ranks = adapters.ranks()
    again = ra.RankController(adapters, ra.RankBudget(params=adapters.num_params()), total_steps=6)
    train_mlp(model, again, torch.optim.AdamW(adapters.parameters(), lr=1e-3), 6)
    again.finish()
    assert adapters.ranks() == ranks
    with pytest.raises(BudgetError, match="above what these adapters still hold"):
        ra.RankController(adapters, ra.RankBudget(params=400), total_steps=6)


# --- what cannot work ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    [
        (BudgetError, {"budget": ra.RankBudget(ranks=13)}, "above the 12"),
        (BudgetError, {"steps": 10.5}, "total_steps"),
        (BudgetError, {"steps": 0}, "total_steps"),
        (ConfigError, {"method": "adalorra"}, "did you mean 'adalora'"),
        (ConfigError, {"beta3": 0.5}, "did you mean 'beta2'"),
        (ConfigError, {"method": "uniform", "beta1": 0.5}, "beta1"),
        (ConfigError, {"attach": {"init": "lora"}}, "init='lora'"),
    ],
)
def test_settings_that_cannot_work_are_refused(error, arguments, words):
    with pytest.raises(error) as caught:
        begin(**arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_uniform_control_spends_the_same_budget():
    model = make_mlp()
    budget = ra.RankBudget(ranks=7)
    ranks = ra.plan_ranks(model, None, budget, rank=4)
    assert list(ranks.values()) == [3, 2, 2]
    adapters = ra.attach(model, rank=4, ranks=ranks, init="lora")
    controller = ra.RankController(adapters, budget, STEPS, method="uniform")
    train_mlp(model, controller, torch.optim.AdamW(adapters.parameters(), lr=1e-2), STEPS)
    trace = controller.finish()
    assert adapters.ranks() == ranks and trace.scores is None and trace.allocations[-1].reached == 7
    assert all((a.lam == 1).all() for a in adapters)


# --- the state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 7, 14, 17])
@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize(
    "budget", [BUDGET, ra.RankBudget(params=230, every=3), ra.RankBudget(fraction=0.4, min_rank=1)]
)
def test_an_interrupted_run_goes_on_bit_for_bit(cut, shrink, budget, tmp_path):
    model, adapters, controller, optimizer = begin(budget, shrink=shrink)
    train_mlp(model, controller, optimizer, STEPS)
    whole = controller.finish()

    model_a, _, controller_a, optimizer_a = begin(budget, shrink=shrink)
    train_mlp(model_a, controller_a, optimizer_a, cut)
    torch.save(
        {"model": model_a.state_dict(), "optimizer": optimizer_a.state_dict(), "ranks": controller_a.state_dict()},
        tmp_path / "state.pt",
    )
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    model_b = make_mlp()
    torch.manual_seed(99)
    adapters_b = ra.attach(model_b, rank=4)
    model_b.load_state_dict(saved["model"])
    controller_b = ra.RankController(adapters_b, budget, STEPS, "adalora", shrink=shrink)
    controller_b.load_state_dict(saved["ranks"])
    optimizer_b = torch.optim.AdamW(adapters_b.parameters(), lr=1e-2)
    optimizer_b.load_state_dict(saved["optimizer"])
    train_mlp(model_b, controller_b, optimizer_b, STEPS)
    resumed = controller_b.finish()
    assert_same(tensors_of(model), tensors_of(model_b))
    assert resumed.allocations == whole.allocations and resumed.scores == whole.scores
    assert resumed.budget == whole.budget and resumed.layers == whole.layers
    assert resumed.adapter_params_initial == whole.adapter_params_initial


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": ra.RankBudget(ranks=6, every=2)}, "target was 5 and now is 6"),
        ({"budget": ra.RankBudget(ranks=5, every=3)}, "every was 2 and now is 3"),
        ({"steps": 30}, "total_steps was 20 and now is 30"),
        ({"method": "uniform"}, "began with method 'adalora'"),
        ({"beta1": 0.5}, "beta1"),
        ({"orthogonal": 0.0}, "orthogonal"),
        ({"attach": {"alpha": 100}}, "scaling"),
        ({"attach": {"target_modules": ["0", "2"]}, "budget": ra.RankBudget(ranks=5, every=2)}, "3 layers"),
    ],
)
def test_a_run_goes_on_only_with_the_settings_it_began_with(change, words):
    model, adapters, controller, optimizer = begin()
    train_mlp(model, controller, optimizer, 7)
    state = controller.state_dict()
    other_model, _, other, _ = begin(**change)
    own = {k: v for k, v in model.state_dict().items() if k in other_model.state_dict()}
    other_model.load_state_dict(own, strict=False)
    with pytest.raises(RankallocError) as caught:
        other.load_state_dict(state)
    assert words in str(caught.value) and "cannot resume" in str(caught.value)
    assert other.step == 0


def test_a_state_without_its_weights_is_refused():
    model, adapters, controller, optimizer = begin()
    train_mlp(model, controller, optimizer, 7)
    _, _, other, _ = begin()
    with pytest.raises(RankallocError, match="not those the rank state was saved with"):
        other.load_state_dict(controller.state_dict())


@pytest.mark.parametrize("damage", ["version", "tensor", "json"])
def test_a_damaged_state_is_refused(damage):
    model, adapters, controller, optimizer = begin()
    train_mlp(model, controller, optimizer, 7)
    state = controller.state_dict()
    if damage == "version":
        state["meta"] = json.dumps({**json.loads(state["meta"]), "version": 99})
    elif damage == "tensor":
        state["tensors"].pop("sensitivity.0.P")
    else:
        state["meta"] = "{"
    fresh = ra.RankController(adapters, BUDGET, STEPS, "adalora")
    with pytest.raises(RankallocError):
        fresh.load_state_dict(state)
    assert fresh.step == 0


# --- the trace -------------------------------------------------------------------------------------------------


def test_the_trace_is_written_where_asked(tmp_path):
    model, adapters, controller, optimizer = begin(seed=7)
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
        begin(ra.RankBudget(**given))
