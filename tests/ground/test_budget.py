"""The budget: what may be said, and its exact course over the steps."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankalloc import LayerShape, RankBudget
from rankalloc.errors import BudgetError

LAYERS = [LayerShape("up", 8, 24, 12), LayerShape("down", 24, 8, 12), LayerShape("out", 8, 8, 12)]


def refused(*, layers=LAYERS, steps=100, **given_):
    with pytest.raises(BudgetError) as caught:
        RankBudget(**given_).resolve(layers, steps)
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 300
    return message


def test_cubic_course_is_adaloras_formula():
    plan = RankBudget(ranks=24, warmup=0.1, freeze=0.3).resolve(LAYERS, 100)
    assert (plan.initial, plan.target, plan.warmup_steps, plan.freeze_step) == (36, 24, 10, 70)
    for step in range(1, 101):
        if step <= 10:
            expected = 36
        elif step >= 70:
            expected = 24
        else:
            expected = math.floor(24 + 12 * (1 - Fraction(step - 10, 60)) ** 3)
        assert plan.asked(step) == expected, step


def test_course_agrees_with_pefts_schedule():
    peft = pytest.importorskip("peft")
    from peft.tuners.adalora.layer import RankAllocator

    class Bare(RankAllocator):
        def __init__(self):
            self.peft_config = peft.AdaLoraConfig(
                init_r=12, target_r=8, tinit=10, tfinal=30, deltaT=7, total_step=100, target_modules=["x"]
            )
            self.init_bgt, self.target_bgt = 36, 24

    plan = RankBudget(ranks=24, warmup=0.1, freeze=0.3, every=7).resolve(LAYERS, 100)
    assert [plan.asked(s) for s in range(1, 101)] == [Bare().budget_schedule(s)[0] for s in range(1, 101)]


def test_linear_and_constant_courses():
    linear = RankBudget(ranks=6, warmup=0, freeze=0, shape="linear").resolve(LAYERS, 30)
    assert [linear.asked(s) for s in (1, 10, 15, 29, 30)] == [35, 26, 21, 7, 6]
    constant = RankBudget(ranks=6, warmup=0.2, freeze=0.2, shape="constant", every=3).resolve(LAYERS, 30)
    assert [constant.asked(s) for s in (1, 6, 7, 23, 30)] == [36, 36, 6, 6, 6]


def test_allocations_happen_after_the_warm_up_and_at_the_freeze_and_never_later():
    plan = RankBudget(ranks=24, warmup=0.1, freeze=0.3, every=20).resolve(LAYERS, 100)
    assert [s for s in range(1, 101) if plan.allocates(s)] == [30, 50, 70]
    plan = RankBudget(ranks=24, warmup=0.1, freeze=0.3, every=25).resolve(LAYERS, 100)
    assert [s for s in range(1, 101) if plan.allocates(s)] == [35, 60, 70]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", ["cubic", "linear", "constant"])
def test_tiny_runs_allocate_and_end_at_the_target(steps, shape):
    plan = RankBudget(ranks=24, shape=shape, every=1).resolve(LAYERS, steps)
    assert 0 <= plan.warmup_steps < plan.freeze_step <= steps
    assert plan.allocates(plan.freeze_step)
    assert plan.asked(plan.freeze_step) == plan.asked(steps) == 24


@settings(max_examples=150, deadline=None)
@given(
    steps=st.integers(1, 400), warmup=st.floats(0, 0.5), freeze=st.floats(0, 0.49), every=st.integers(1, 30),
    shape=st.sampled_from(["cubic", "linear", "constant"]), unit=st.sampled_from(["ranks", "params", "bytes"]),
    share=st.floats(0, 1), size=st.sampled_from([1, 2, 3]), floor=st.integers(0, 3),
    cap=st.sampled_from([None, 3, 6, 12]),
)
def test_course_is_monotone_whole_and_ends_exactly(steps, warmup, freeze, every, shape, unit, share, size, floor, cap):
    highest = 12 if cap is None else cap // size * size
    low = -(-floor // size) * size
    if low > highest:
        return
    per = {"ranks": 3, "params": 32 + 32 + 16, "bytes": 4 * (32 + 32 + 16)}[unit]
    target = int(per * (low + share * (highest - low)))
    if unit == "ranks":
        target = target // size * size
    target = max(target, per * low)
    budget = RankBudget(
        **{unit: target}, warmup=warmup, freeze=freeze, every=every, shape=shape, multiple_of=size, min_rank=floor,
        max_rank=cap,
    )
    plan = budget.resolve(LAYERS, steps)
    course = [plan.asked(s) for s in range(1, steps + 1)]
    assert all(isinstance(value, int) for value in course)
    assert all(a >= b for a, b in zip(course, course[1:], strict=False))
    assert course[-1] == course[plan.freeze_step - 1] == target
    assert all(value == plan.initial for value in course[: plan.warmup_steps])
    assert all(value >= target for value in course)
    if unit == "ranks":
        assert all(value % size == 0 for value in course[plan.warmup_steps :])
    assert not any(plan.allocates(s) for s in range(plan.freeze_step + 1, steps + 1))
    assert not any(plan.allocates(s) for s in range(1, plan.warmup_steps + 1))


def test_units_of_the_same_budget():
    whole = sum(layer.rank * layer.params_per_rank for layer in LAYERS)
    assert RankBudget(fraction=0.5).resolve(LAYERS).target == whole // 2
    assert RankBudget(fraction=1.0).resolve(LAYERS).target == whole
    assert RankBudget(fraction=0.5).resolve(LAYERS).unit == "params"
    assert RankBudget(params=500).resolve(LAYERS).initial == 12 * (32 + 32 + 16)
    half = RankBudget(bytes=1000).resolve(LAYERS, bytes_per_param=2)
    assert (half.initial, half.costs, half.spent([1, 0, 2])) == (2 * 960, (64, 64, 32), 128)


@pytest.mark.parametrize("fraction", [k / 36 for k in range(2, 37)] + [0.29, 0.57, 0.58])
def test_fraction_never_loses_a_parameter_to_rounding(fraction):
    layers = LAYERS if fraction not in (0.29, 0.57, 0.58) else [LayerShape(str(i), 99, 99, 10) for i in range(10)]
    total = sum(layer.rank * layer.params_per_rank for layer in layers)
    expected = math.floor(Fraction(fraction).limit_denominator(10_000) * total)
    assert RankBudget(fraction=fraction).resolve(layers).target == expected


def test_a_fraction_too_small_for_one_rank_is_refused_instead_of_pruning_everything():
    assert "fraction=0.01" in refused(fraction=0.01)
    assert "fraction=0.05" in refused(fraction=0.05, multiple_of=4)


def test_zero_ranks_and_all_ranks_are_budgets():
    assert RankBudget(ranks=0).resolve(LAYERS).target == 0
    assert RankBudget(ranks=36).resolve(LAYERS).target == 36


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "none of them"),
        ({"ranks": 3, "params": 100}, "ranks=3, params=100"),
        ({"ranks": 3, "fraction": 0.5}, "ranks=3, fraction=0.5"),
        ({"ranks": -1}, "-1"),
        ({"ranks": 2.5}, "2.5"),
        ({"ranks": True}, "True"),
        ({"ranks": "8"}, "'8'"),
        ({"params": 1e3}, "1000.0"),
        ({"bytes": -5}, "-5"),
        ({"fraction": 0}, "fraction must be above 0"),
        ({"fraction": 1.5}, "1.5"),
        ({"fraction": float("nan")}, "nan"),
        ({"fraction": "half"}, "'half'"),
        ({"fraction": True}, "True"),
        ({"ranks": 3, "min_rank": -1}, "min_rank"),
        ({"ranks": 3, "min_rank": 1.0}, "min_rank"),
        ({"ranks": 3, "max_rank": "x"}, "max_rank"),
        ({"ranks": 3, "multiple_of": 0}, "multiple_of"),
        ({"ranks": 3, "every": 0}, "every"),
        ({"ranks": 3, "every": True}, "every"),
        ({"ranks": 3, "warmup": -0.1}, "warmup"),
        ({"ranks": 3, "freeze": 1.1}, "freeze"),
        ({"ranks": 3, "warmup": None}, "warmup"),
        ({"ranks": 3, "warmup": float("nan")}, "warmup"),
        ({"ranks": 3, "warmup": 0.5, "freeze": 0.5}, "leave no steps"),
        ({"ranks": 3, "shape": "cubik"}, "did you mean 'cubic'"),
        ({"ranks": 3, "min_rank": 4, "max_rank": 2}, "min_rank=4 is above max_rank=2"),
        ({"ranks": 37}, "above the 36"),
        ({"params": 961}, "above the 960"),
        ({"ranks": 2, "min_rank": 1}, "below the floor"),
        ({"ranks": 20, "max_rank": 5}, "allows 15"),
        ({"ranks": 20, "min_rank": 13}, "above the 12 that the adapters start with in up; lower it, or begin"),
        ({"ranks": 20, "multiple_of": 5}, "does not divide the initial rank 12"),
        ({"ranks": 21, "multiple_of": 4}, "say 20 or 24"),
        ({"ranks": 12, "multiple_of": 4, "min_rank": 5, "max_rank": 7}, "no multiple of 4"),
    ],
)
def test_bad_budgets_get_one_clear_sentence(arguments, words):
    assert words in refused(**arguments)


@pytest.mark.parametrize("steps", [0, -3, 10.5, 10.0, True, "10", None])
def test_run_length_must_be_a_whole_number(steps):
    assert "total_steps" in refused(ranks=3, steps=steps)


def test_numpy_numbers_are_numbers_and_leave_plain_ones_behind():
    import json

    budget = RankBudget(ranks=np.int64(6), min_rank=np.int64(1))
    assert json.dumps(budget.given) == '{"ranks": 6}'
    assert RankBudget(fraction=np.float64(0.5)).resolve(LAYERS).target == 480
    assert type(budget.resolve(LAYERS, 10).target) is int
