"""What a controller refuses, and how it reports gradients that are not finite and runs that end early."""

from __future__ import annotations

import copy

import pytest
import torch

import rankalloc as ra
from rankalloc.errors import BudgetError, ConfigError, NotAdaptedError
from tests.support.models import assert_same, make_mlp, tensors_of
from tests.support.training import BUDGET, STEPS, begin_mlp, train_mlp

# --- gradients that are not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_without_finite_gradients_is_left_out_of_the_scores(bad):
    """The same run, with one observation poisoned and with that observation skipped."""
    ended = []
    for poison in (True, False):
        model, adapters, controller, optimizer = begin_mlp(orthogonal=0.0)

        def meddle(step, adapters=adapters, controller=controller, poison=poison):
            if step != 4:
                if controller.state.score is not None:
                    vars(controller.state.score).pop("observe", None)
                return
            for p in adapters.parameters():
                p.grad.zero_()  # the optimizer sees the same in both runs; only what is observed differs
            if poison:
                adapters.modules["2"].Q.grad[0, 0] = bad
            else:
                controller.state.score.observe = lambda: None

        def clean(optimizer=optimizer, adapters=adapters):
            for p in adapters.parameters():
                if p.grad is not None:
                    p.grad.nan_to_num_(0.0, 0.0, 0.0)

        optimizer.register_step_pre_hook(lambda *_, clean=clean: clean())
        train_mlp(model, controller, optimizer, STEPS, before_observe=meddle)
        trace = controller.finish()
        ended.append((tensors_of(model), trace.scores, trace.nonfinite_steps))
    assert_same(ended[0][0], ended[1][0])
    assert ended[0][1] == ended[1][1]
    assert (ended[0][2], ended[1][2]) == ([4], [])


def test_weights_that_are_no_numbers_any_more_are_told_and_the_trace_survives(tmp_path):
    model, adapters, controller, optimizer = begin_mlp()
    train_mlp(model, controller, optimizer, STEPS)
    next(a for a in adapters if a.rank).P.data[0, 0] = float("nan")
    trace = controller.finish(tmp_path)
    assert "not finite" in trace.alerts[-1]
    assert ra.RankTrace.load(tmp_path / "trace.json").finished


# --- what is asked for must happen -----------------------------------------------------------------------------


def test_update_without_observe_is_an_error():
    model, adapters, controller, optimizer = begin_mlp()
    model(torch.randn(2, 16)).sum().backward()
    with pytest.raises(NotAdaptedError, match="without observe"):
        controller.update(optimizer)
    controller.observe()
    controller.update(optimizer)
    with pytest.raises(NotAdaptedError, match="without observe"):
        controller.update(optimizer)


def test_observe_without_gradients_is_an_error():
    model, adapters, controller, optimizer = begin_mlp()
    with pytest.raises(NotAdaptedError, match="no adapter received a gradient"):
        controller.observe()


def test_finish_without_a_step_is_an_error(tmp_path):
    _, adapters, controller, _ = begin_mlp()
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
    model, _, controller, _ = begin_mlp()
    model(torch.randn(2, 16)).sum().backward()
    controller.observe()
    with pytest.raises(NotAdaptedError, match="shrink=False"):
        controller.update()
    model, _, controller, _ = begin_mlp(shrink=False)
    model(torch.randn(2, 16)).sum().backward()
    controller.observe()
    controller.update()
    assert controller.step == 1


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_an_early_stop_is_brought_to_the_budget_and_said(with_optimizer):
    model, adapters, controller, optimizer = begin_mlp()
    train_mlp(model, controller, optimizer, 6)
    trace = controller.finish(optimizer=optimizer if with_optimizer else None)
    assert sum(adapters.ranks().values()) == 5
    assert len(trace.alerts) == 1 and "after step 6, before the freeze at step 14" in trace.alerts[0]
    assert (trace.allocations[-1].step, trace.allocations[-1].asked, trace.steps_done) == (6, 5, 6)
    assert ({a.rank for a in adapters} == {4}) != with_optimizer


@pytest.mark.parametrize("steps", [6, STEPS])
def test_finishing_twice_changes_nothing(steps):
    model, adapters, controller, optimizer = begin_mlp()
    train_mlp(model, controller, optimizer, steps)
    first = copy.deepcopy(controller.finish(optimizer=optimizer))
    second = controller.finish(optimizer=optimizer)
    assert first.model_dump(exclude={"wall_seconds"}) == second.model_dump(exclude={"wall_seconds"})


def test_a_second_run_on_adapters_that_shrank_keeps_their_ranks():
    model, adapters, controller, optimizer = begin_mlp(ra.RankBudget(params=230, every=2))
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
        (ConfigError, {"attach": {"init": "lora"}, "method": "l1ra"}, "init='lora'"),
        (ConfigError, {"attach": {"init": "lora"}, "orthogonal": 0.1}, "init='lora'"),
    ],
)
def test_settings_that_cannot_work_are_refused(error, arguments, words):
    with pytest.raises(error) as caught:
        begin_mlp(**arguments)
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


@pytest.mark.parametrize("part", ["score", "rule", "allocator"])
def test_a_method_from_outside_that_names_an_unknown_part_is_refused_in_one_sentence(part, monkeypatch):
    words = {"name": "mine", "summary": "", "source": "", "cost": "", "weakness": "", "score": None}
    made = ra.Method(**{**words, part: "nope"})
    monkeypatch.setitem(ra.METHODS, "mine", made)
    with pytest.raises(ConfigError, match=f"method 'mine' names an unknown {part} 'nope'"):
        ra.RankController(ra.attach(make_mlp(), rank=4), ra.RankBudget(ranks=5), 6, method="mine")


def test_a_method_is_a_name():
    with pytest.raises(ConfigError, match="unknown method"):
        ra.RankController(ra.attach(make_mlp(), rank=4), ra.RankBudget(ranks=5), 6, method=ra.METHODS["auto"])
