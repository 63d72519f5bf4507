"""Plans: what they say, how they are attached, and ranks given by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft.utils.other import get_pattern_key

import rankalloc as ra
from rankalloc.adapters.plan import RankPlan
from rankalloc.errors import BudgetError, ConfigError, NotAdaptedError, RankallocError, TargetError
from rankalloc.methods.planners.planning import first_batches
from rankalloc.training.planned import plan_adapters
from tests.support.batches import mlp_batches, token_batches
from tests.support.models import make_bert, make_mlp
from tests.support.training import train_mlp

BUDGET = ra.RankBudget(ranks=24)


def eva(model=None, **options):
    return ra.plan_ranks(model or make_bert(), token_batches(2), BUDGET, "eva", rank=4, **options)


def test_a_plan_is_a_plain_dict_that_knows_where_it_comes_from():
    plan = eva()
    assert isinstance(plan, dict) and dict(plan) == plan and sum(plan.values()) == 24
    assert (plan.method, plan.init, plan.rank, plan.budget) == ("eva", "lora", 4, BUDGET)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert type(other) is RankPlan and other == plan and other.budget == BUDGET and other.notes == plan.notes
        assert all(torch.equal(other.factors[name].Q, f.Q) for name, f in plan.factors.items())


def test_attach_takes_rank_and_init_from_the_plan_unless_told_otherwise():
    model = make_bert()
    adapters = ra.attach(model, ranks=eva(model))
    assert (adapters.rank, adapters.init, adapters.scaling) == (4, "lora", 2.0)
    model = make_bert()
    adapters = ra.attach(model, 8, 8, ranks=eva(model), init="svd")
    assert (adapters.rank, adapters.init, adapters.scaling) == (8, "svd", 1.0)
    # the plan's start holds in another parametrisation too
    assert all((a.lam == 1).all() and not a.P.any() for a in adapters if a.rank)
    model = make_bert()
    plain = ra.attach(model, ranks=dict(eva(model)))
    assert (plain.rank, plain.init, plain.plan) == (12, "svd", None) and sum(plain.ranks().values()) == 24


def test_a_rank_changed_after_planning_is_refused_before_anything_is_written():
    model = make_bert()
    plan = eva(model)
    name = next(name for name, rank in plan.items() if rank)
    plan[name] += 1
    with pytest.raises(ConfigError, match="plan again"):
        ra.attach(model, ranks=plan)


def test_an_adapted_model_is_planned_through_its_adapters():
    model = make_bert()
    adapters = ra.attach(model, rank=4)
    with pytest.raises(TargetError, match="plan before rankalloc.attach"):
        eva(model)
    next(iter(adapters)).lam.data.fill_(1.0)
    with pytest.raises(RankallocError, match="has learned already"):
        plan_adapters(adapters, token_batches(1), BUDGET, "eva")


def test_no_rank_is_above_the_smaller_side_of_a_weight():
    plan = ra.plan_ranks(make_mlp(), mlp_batches(), ra.RankBudget(ranks=40), "eva", rank=20)
    assert plan["0"] <= 16 and plan["4"] <= 8 and sum(plan.values()) == 40
    ra.attach(make_mlp(), ranks=plan)


@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    [
        (ConfigError, {"method": "adalora"}, "while training; before it, use one of: uniform, eva"),
        (ConfigError, {"method": "eva", "tua": 0.9}, "did you mean 'tau'"),
        (ConfigError, {"method": "eva", "placement": "shufled"}, "did you mean 'shuffled'"),
        (ConfigError, {"method": "eva", "budget": None}, "needs a budget"),
        (BudgetError, {"method": "eva", "budget": ra.RankBudget(ranks=49)}, "above the 48"),
        (BudgetError, {"method": "uniform", "budget": ra.RankBudget(params=10)}, "buys no rank"),
    ],
)
def test_what_cannot_be_planned_is_refused(error, arguments, words):
    settings = {"budget": BUDGET, "rank": 4, **arguments}
    with pytest.raises(error, match=words):
        ra.plan_ranks(make_bert(), token_batches(1), **settings)


def test_controls_move_the_ranks_a_method_chose():
    own = eva()
    shuffled, uniform = eva(placement="shuffled", seed=1), eva(placement="uniform")
    assert sorted(shuffled.values()) == sorted(own.values()) and set(uniform.values()) == {2}
    budget = ra.RankBudget(ranks=30)
    own = ra.plan_ranks(make_bert(), token_batches(2), budget, "gora", rank=12)
    shuffled = ra.plan_ranks(make_bert(), token_batches(2), budget, "gora", rank=12, placement="shuffled", seed=1)
    assert sorted(shuffled.values()) == sorted(own.values()) and shuffled != own
    grouped = ra.plan_ranks(make_bert(), token_batches(2), budget, "gora", rank=12, placement="grouped")
    assert sum(grouped.values()) == 30
    by_role = [abs(grouped[n] - grouped[n.replace("layer.0", "layer.1")]) for n in grouped if "layer.0" in n]
    assert sum(by_role) <= 1


def test_the_first_batches_are_those_of_the_dataset_in_its_order():
    assert list(first_batches(range(7), list, 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    endless = iter(int, 1)
    assert next(first_batches(endless, list, 2)) == [0, 0]


# --- ranks by name ---------------------------------------------------------------------------------------------


def manual(pattern, budget=None, rank=4):
    return ra.plan_ranks(make_bert(), None, budget, "manual", rank=rank, rank_pattern=pattern)


def test_a_pattern_means_what_it_means_in_peft():
    patterns = [
        {"query": 1, "output.dense": 2}, {r"layer\.1\..*dense": 3, "dense": 0},
        {"bert.encoder.layer.0.attention.self.key": 5}, {r".*\.[01]\.attention.*": 2, "query": 1},
    ]
    for pattern in patterns:
        plan = manual(pattern)
        for name, rank in plan.items():
            assert rank == pattern.get(get_pattern_key(pattern, name), 4), (pattern, name)
    assert sum(manual(patterns[0], ra.RankBudget(ranks=34)).values()) == 34
    assert sum(manual({"query": 9}, ra.RankBudget(ranks=58)).values()) == 58  # above the peak


def test_a_pattern_spends_its_budget_or_says_what_it_costs():
    pattern = {"self.(query|key|value)": 2, "dense": 1}
    spent = 6 * 2 * 64 + 2 * 64 + 4 * 96
    assert manual(pattern, ra.RankBudget(params=spent + 63)) == manual(pattern)
    for budget, words in (
        (ra.RankBudget(ranks=19), "costs 18 ranks and the budget is 19: change the pattern, or say ranks=18"),
        (ra.RankBudget(ranks=17), "costs 18 ranks and the budget is 17"),
        (ra.RankBudget(params=spent - 1), f"costs {spent:,} params"),
        (ra.RankBudget(params=spent + 64), f"say params={spent}"),
        (ra.RankBudget(fraction=0.4), f"costs {spent:,} params and the budget is 1,433"),
        (ra.RankBudget(ranks=18, multiple_of=2), "multiples of 2"),
        (ra.RankBudget(ranks=24, min_rank=2), "budget allows multiples of 1 from 2 to 4"),
    ):
        with pytest.raises(BudgetError, match=words):
            manual(pattern, budget)
    assert sum(manual(pattern, ra.RankBudget(fraction=0.36)).values()) == 18


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (None, "rank_pattern="), ({"qeury": 2}, "did you mean 'query'"), ({"(": 2}, "regular expression"),
        ({"query": 33}, "from 0 to 32"), ({"query": -1}, "whole number"), ({"query": True}, "whole number"),
        ([("query", 2)], "mapping"),
    ],
)
def test_a_pattern_that_cannot_be_read_is_refused(pattern, words):
    with pytest.raises(ConfigError, match=words):
        manual(pattern)


def test_a_manual_plan_trains_under_the_budget_it_costs():
    model = make_mlp()
    plan = ra.plan_ranks(model, None, None, "manual", rank=4, rank_pattern={"0": 1, "2": 0})
    adapters = ra.attach(model, ranks=plan)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=5), 6, "manual")
    train_mlp(model, controller, torch.optim.AdamW(adapters.parameters(), lr=1e-2), 6)
    assert controller.finish().final_ranks == [1, 0, 4]


def test_types_have_one_rank_in_proportion_to_their_weights():
    def plan(total, **options):
        return ra.plan_ranks(make_bert(), None, ra.RankBudget(ranks=total), "module-types", rank=12, **options)

    weighted = plan(28, weights={"query": 4, "value": 4, "dense": 2, "key": 0})
    assert {rank for name, rank in weighted.items() if "key" in name} == {0}
    assert {rank for name, rank in weighted.items() if "query" in name or "value" in name} == {4}
    assert {rank for name, rank in weighted.items() if "dense" in name} == {2}
    assert set(plan(36).values()) == {3} and max(plan(37).values()) == 4
    with pytest.raises(ConfigError, match="at least 0"):
        plan(24, weights={"query": -1})
    with pytest.raises(ConfigError, match="did you mean"):
        plan(24, weights={"quary": 1})


# --- a controller ----------------------------------------------------------------------------------------------


def test_a_controller_without_a_plan_says_how_to_make_one():
    adapters = ra.attach(make_bert(), rank=4, init="lora")
    with pytest.raises(NotAdaptedError, match=r"ranks=rankalloc.plan_ranks\(model, batches, budget, 'eva'\)"):
        ra.RankController(adapters, BUDGET, 10, "eva")
    model = make_bert()
    adapters = ra.attach(model, ranks=eva(model))
    with pytest.raises(BudgetError, match="ranks=20, and the plan .* spends 24"):
        ra.RankController(adapters, ra.RankBudget(ranks=20), 10, "eva")


@pytest.mark.parametrize("given", [{"fraction": 0.5}, {"params": 3000}, {"bytes": 9999}, {"ranks": 24, "max_rank": 3}])
def test_a_controller_takes_the_budget_that_was_planned_for(given):
    model, budget = make_bert(), ra.RankBudget(**given)
    adapters = ra.attach(model, ranks=ra.plan_ranks(model, token_batches(1), budget, "fim", rank=4))
    controller = ra.RankController(adapters, budget, 10, "fim")
    schedule = controller.schedule
    assert schedule.target == schedule.initial == schedule.spent(list(adapters.ranks().values()))
