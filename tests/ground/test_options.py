"""Option values are checked in one way: numpy's numbers are numbers, and True, "8" and 8.0 are not whole ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rankalloc as ra
from rankalloc.errors import BudgetError, ConfigError
from rankalloc.methods.planners.eva import EVA
from rankalloc.methods.planners.gora import GoRA
from rankalloc.methods.planners.manual import Manual
from rankalloc.methods.planners.module_types import ModuleTypes
from rankalloc.options import choice, flag, integer, number
from rankalloc.posthoc.combining import combiner

SHAPES = [ra.LayerShape("a", 16, 16, 12), ra.LayerShape("b", 16, 8, 12)]
EIGHT = ra.RankBudget(ranks=8)
NOT_WHOLE = (True, "8", 8.0, np.float32(8), None)
NOT_NUMBERS = (True, "0.5", float("nan"), float("inf"), [0.5])


def attached(**options):
    return ra.attach(nn.Sequential(nn.Linear(16, 16)), **options)


def type_weight(weight):
    probe = type("Names", (), {"targets": ["a", "b"], "peaks": {"a": 2, "b": 2}})
    return ModuleTypes({"a": weight}).scores(probe, None)["a"][0]


def at_rank(value):
    adapters = attached(rank=10, init="lora")
    ra.RankController(adapters, ra.RankBudget(fraction=1.0), total_steps=4, method="dylora")  # which makes them nested
    with ra.at_rank(adapters, value):
        return adapters.ranks()["0"]


WHOLE = {
    "budget ranks": lambda v: ra.RankBudget(ranks=v).ranks,
    "budget params": lambda v: ra.RankBudget(params=v).params,
    "budget bytes": lambda v: ra.RankBudget(bytes=v).bytes,
    "budget min_rank": lambda v: ra.RankBudget(ranks=9, min_rank=v).min_rank,
    "budget max_rank": lambda v: ra.RankBudget(ranks=9, max_rank=v).max_rank,
    "budget multiple_of": lambda v: ra.RankBudget(ranks=8, multiple_of=v).multiple_of,
    "budget every": lambda v: ra.RankBudget(ranks=8, every=v).every,
    "run length": lambda v: ra.RankBudget(ranks=8).resolve(SHAPES, v).total_steps,
    "attach rank": lambda v: attached(rank=v).rank,
    "attach ranks": lambda v: attached(ranks={"0": v}).ranks()["0"],
    "plan_ranks rank": lambda v: ra.plan_ranks(nn.Sequential(nn.Linear(16, 16)), None, EIGHT, rank=v).rank,
    "at_rank": at_rank,
    "max_batches": lambda v: EVA(max_batches=v).max_batches,
    "passes": lambda v: EVA(passes=v).passes,
    "rank_pattern": lambda v: Manual({"b": v}).given(SHAPES)["b"],
    "max_bytes": lambda v: ra.AdapterLibrary(Path(__file__).parent, max_bytes=v).max_bytes,
}
NONE_IS_A_DEFAULT = ("budget ranks", "budget params", "budget bytes", "budget max_rank", "attach rank", "max_bytes")
NUMBERS = {
    "budget fraction": lambda v: ra.RankBudget(fraction=v).fraction,
    "budget warmup": lambda v: ra.RankBudget(ranks=8, warmup=v, freeze=0.1).warmup,
    "budget freeze": lambda v: ra.RankBudget(ranks=8, warmup=0.1, freeze=v).freeze,
    "alpha": lambda v: attached(rank=2, alpha=v).alpha,
    "dropout": lambda v: next(iter(attached(rank=2, dropout=v))).dropout.p,
    "tau": lambda v: EVA(tau=v).tau,
    "gamma": lambda v: GoRA(gamma=v).gamma,
    "type weight": type_weight,
    "density": lambda v: combiner("ties", v) and v,
}


@pytest.mark.parametrize("value", [8, np.int64(8), np.uint8(8)])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_of_every_type_become_plain_ones(name, value):
    taken = WHOLE[name](value)
    assert taken == 8 and type(taken) is int and json.dumps(taken) == "8"


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, v) for name in WHOLE for v in NOT_WHOLE if v is not None or name not in NONE_IS_A_DEFAULT],
)
def test_what_is_not_a_whole_number_is_refused(name, value):
    with pytest.raises((ConfigError, BudgetError), match="must be a whole number") as caught:
        WHOLE[name](value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5)])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_every_type_become_plain_ones(name, value):
    if name == "density":
        pytest.importorskip("peft")
    assert NUMBERS[name](value) == 0.5


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_not_a_number_is_refused(name, value):
    with pytest.raises((ConfigError, BudgetError), match="must be a number") as caught:
        NUMBERS[name](value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("ends", "low", "high"), [(True, True, True), (False, False, False), ("low", True, False), ("high", False, True)]
)
def test_the_ends_of_a_range_are_in_or_out_as_said(ends, low, high):
    for end, allowed, words in ((0, low, "above 0"), (1, high, "below 1")):
        if allowed:
            assert number("x", end, 0, 1, ends) == end
        else:
            with pytest.raises(ConfigError, match=words):
                number("x", end, 0, 1, ends)


def test_the_other_checks_keep_their_words():
    assert integer("x", 3, 1, 3) == 3 and flag("x", False) is False and choice("x", "a", {"a": 1}) == "a"
    for check, words in (
        (lambda: integer("x", 4, 1, 3), "x must be a whole number from 1 to 3, got 4"),
        (lambda: flag("x", 1), "x must be true or false, got 1"),
        (lambda: flag("x", "no"), "x must be true or false, got 'no'"),
        (lambda: choice("x", "uniforn", ["uniform", "random"]), "unknown x 'uniforn' .did you mean 'uniform'"),
        (lambda: choice("x", ["uniform"], ["uniform", "random"]), "unknown x .'uniform'.* known: uniform, random"),
        (lambda: choice("x", None, ["uniform"]), "unknown x None"),
    ):
        with pytest.raises(ConfigError, match=words):
            check()
    with pytest.raises(BudgetError):
        integer("x", 0, 1, error=BudgetError)


def test_a_tensor_is_no_number():
    with pytest.raises(ConfigError, match="whole number"):
        attached(rank=torch.tensor(2))
