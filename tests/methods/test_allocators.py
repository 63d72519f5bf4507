"""Kept ranks equal the budget, exactly, whatever is asked: over every allocation rule there is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from scipy import optimize

from rankalloc import LayerShape, RankBudget
from rankalloc.errors import RankallocError
from rankalloc.methods.allocators import ALLOCATORS, Demand

RULES = sorted(ALLOCATORS)


@st.composite
def cases(draw):
    """(scores, demand, unit): always satisfiable, often tied, with floors, caps and blocks."""
    size = draw(st.sampled_from([1, 1, 1, 2, 3, 4]))
    count = draw(st.integers(1, 8))
    ranks = [size * draw(st.integers(1, 5)) for _ in range(count)]
    shapes = [LayerShape(f"l{i}", draw(st.integers(1, 40)), draw(st.integers(1, 40)), r) for i, r in enumerate(ranks)]
    unit = draw(st.sampled_from(["ranks", "params", "bytes"]))
    floor = draw(st.integers(0, min(ranks)))
    cap = draw(st.one_of(st.none(), st.integers(-(-floor // size) * size, max(ranks) + 2)))
    floors = [-(-floor // size) * size] * count
    caps = [min(r, cap if cap is not None else r) // size * size for r in ranks]
    costs = [1 if unit == "ranks" else s.params_per_rank * (4 if unit == "bytes" else 1) for s in shapes]
    low = sum(c * f for c, f in zip(costs, floors, strict=True))
    high = sum(c * k for c, k in zip(costs, caps, strict=True))
    if any(f > k for f, k in zip(floors, caps, strict=True)):
        cap, caps = None, ranks
        high = sum(c * k for c, k in zip(costs, caps, strict=True))
    amount = draw(st.sampled_from([low, high, None]))
    if amount is None:
        amount = draw(st.integers(low, high))
    if unit == "ranks":
        amount = amount // size * size
    value = draw(st.sampled_from([
        st.floats(-1e6, 1e6), st.integers(0, 3).map(float), st.just(0.0), st.floats(0, 1e-30), st.just(1e300),
    ]))
    scores = [np.array(draw(st.lists(value, min_size=r, max_size=r))) for r in ranks]
    plan = RankBudget(**{unit: amount}, min_rank=floor, max_rank=cap, multiple_of=size).resolve(shapes, 10)
    groups = draw(st.one_of(st.just(()), st.lists(st.integers(0, 2), min_size=count, max_size=count).map(tuple)))
    return scores, replace(Demand.at(plan, plan.freeze_step), groups=groups), unit


@settings(max_examples=250, deadline=None, derandomize=True)
@given(case=cases())
def test_the_budget_is_met_exactly(case):
    """Every rule on every case: to draw a case takes longer than to allocate it."""
    for rule in RULES:
        note(rule)
        check_allocation(rule, *case)


def check_allocation(rule, scores, demand, unit):
    before = [values.copy() for values in scores]
    kept = ALLOCATORS[rule](scores, demand)
    ranks = [int(mask.sum()) for mask in kept]

    assert [mask.shape for mask in kept] == [values.shape for values in scores]
    assert all(mask.dtype == bool for mask in kept)
    assert all(np.array_equal(a, b) for a, b in zip(before, scores, strict=True))
    for rank, floor, cap in zip(ranks, demand.floors, demand.caps, strict=True):
        assert floor <= rank <= cap and rank % demand.multiple_of == 0
    spent = sum(c * r for c, r in zip(demand.costs, ranks, strict=True))
    assert spent <= demand.amount
    if unit == "ranks":
        assert spent == demand.amount
    on_sale = [
        cost * demand.multiple_of
        for cost, rank, cap in zip(demand.costs, ranks, demand.caps, strict=True) if rank < cap
    ]
    assert not on_sale or demand.amount - spent < min(on_sale)
    for values, mask in zip(scores, kept, strict=True):
        if mask.any() and not mask.all():
            assert values[mask].min() >= values[~mask].max()
    again = ALLOCATORS[rule](scores, demand)
    assert all(np.array_equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "random"])
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e-38])
@pytest.mark.parametrize("total", range(0, 49, 3))
def test_equal_scores_give_ranks_as_equal_as_they_can_be(rule, value, total):
    demand = Demand(total, (1,) * 5, (0,) * 5, (12, 12, 12, 3, 12))
    ranks = [int(m.sum()) for m in ALLOCATORS[rule]([np.full(12, value)] * 5, demand)]
    assert sum(ranks) == total
    free = ranks[:3] + ranks[4:]
    assert max(free) - min(free) <= 1
    assert min(3, min(free)) <= ranks[3] <= min(3, max(free))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_refused(rule, bad):
    scores = [np.ones(4), np.array([1.0, bad, 2.0, 3.0])]
    with pytest.raises(RankallocError, match="not finite"):
        ALLOCATORS[rule](scores, Demand(4, (1, 1), (0, 0), (4, 4)))


@pytest.mark.parametrize("rule", RULES)
def test_nothing_and_everything_are_budgets(rule):
    scores = [np.arange(4.0), np.arange(6.0)]
    assert [m.sum() for m in ALLOCATORS[rule](scores, Demand(0, (1, 1), (0, 0), (4, 6)))] == [0, 0]
    assert [m.sum() for m in ALLOCATORS[rule](scores, Demand(10, (1, 1), (0, 0), (4, 6)))] == [4, 6]


def test_global_keeps_the_highest_scores_of_all_layers():
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=8) for _ in range(5)]
    kept = ALLOCATORS["global"](scores, Demand(13, (1,) * 5, (0,) * 5, (8,) * 5))
    flat, mask = np.concatenate(scores), np.concatenate(kept)
    assert set(np.flatnonzero(mask)) == set(np.argsort(-flat)[:13])


def test_global_buys_by_score_per_cost():
    scores = [np.array([3.0, 2.9]), np.array([2.0, 1.0])]
    kept = ALLOCATORS["global"](scores, Demand(40, (40, 10), (0, 0), (2, 2)))
    assert [m.tolist() for m in kept] == [[False, False], [True, True]]


def purchase(seed):
    """(scores, demand) with scores of at least 0, often tied, and costs that differ widely or not at all."""
    rng = np.random.default_rng(seed)
    size, count = int(rng.choice([1, 1, 2, 3])), int(rng.integers(2, 7))
    ranks = rng.integers(size, 8, count)
    costs = np.full(count, rng.integers(1, 30)) if seed % 4 == 0 else rng.integers(1, 30, count)
    caps = [int(rng.integers(1, rank // size + 1)) * size for rank in ranks]
    floors = [int(rng.integers(0, min(2, cap // size) + 1)) * size * int(rng.integers(2)) for cap in caps]
    amount = int(rng.integers(costs @ floors, costs @ caps + 1))
    scores = [rng.integers(0, 4, rank) * 1.0 if seed % 3 == 0 else rng.random(rank) for rank in ranks]
    return scores, Demand(amount, tuple(costs.tolist()), tuple(floors), tuple(caps), size)


def blocks_of(scores, demand):
    """Per layer the summed scores of its blocks, best first, as many as its cap allows."""
    size = demand.multiple_of
    return [
        np.sort(values)[::-1][: cap // size * size].reshape(-1, size).sum(1)
        for values, cap in zip(scores, demand.caps, strict=True)
    ]


def best_value(blocks, demand):
    """The highest value that the demand allows, from an exact solver."""
    size, flat = demand.multiple_of, np.concatenate(blocks)
    layer = np.repeat(np.arange(len(blocks)), [len(b) for b in blocks])
    rows = np.vstack([np.asarray(demand.costs, float)[layer] * size, *(layer == i for i in range(len(blocks)))])
    low = [-np.inf, *(floor // size for floor in demand.floors)]
    high = [demand.amount, *(len(b) for b in blocks)]
    found = optimize.milp(
        -flat, constraints=optimize.LinearConstraint(rows, low, high), integrality=np.ones(len(flat)), bounds=(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    assert found.success
    return -found.fun


def largest_loss(blocks, demand):
    """score(b) · left / cost(b) for the first block b that does not fit, by buying one block at a time."""
    size, left, sale = demand.multiple_of, demand.amount, []
    for layer, (values, price, floor) in enumerate(zip(blocks, demand.costs, demand.floors, strict=True)):
        left -= price * floor
        cost = price * size
        sale += [(-(value / cost), at, layer, cost, value) for at, value in enumerate(values)][floor // size :]
    for *_, cost, value in sorted(sale):
        if cost > left:
            return value * left / cost
        left -= cost
    return 0.0


def test_global_is_less_than_one_block_from_the_best_there_is():
    short = 0
    for seed in range(100):
        scores, demand = purchase(seed)
        kept = ALLOCATORS["global"](scores, demand)
        value = sum(values[mask].sum() for values, mask in zip(scores, kept, strict=True))
        blocks = blocks_of(scores, demand)
        best = best_value(blocks, demand)
        assert best - largest_loss(blocks, demand) - 1e-6 <= value <= best + 1e-6, seed
        if len(set(demand.costs)) == 1:
            assert value == pytest.approx(best, abs=1e-6), seed
        short += value < best - 1e-6
    assert short >= 10  # cases in which greed costs something, or there would be nothing to see


def test_global_can_be_nearly_that_far_from_the_best():
    scores, demand = [np.array([1.1]), np.array([10.0])], Demand(10, (1, 10), (0, 0), (1, 1))
    kept = ALLOCATORS["global"](scores, demand)
    assert [m.tolist() for m in kept] == [[True], [False]]
    assert best_value(blocks_of(scores, demand), demand) == pytest.approx(10.0)
    assert largest_loss(blocks_of(scores, demand), demand) == pytest.approx(9.0)


def test_uniform_ignores_how_large_scores_are_but_not_their_order_within_a_layer():
    scores = [np.array([1.0, 9.0, 5.0]), np.array([0.1, 0.2, 0.3])]
    kept = ALLOCATORS["uniform"](scores, Demand(3, (1, 1), (0, 0), (3, 3)))
    assert [m.tolist() for m in kept] == [[False, True, True], [False, False, True]]


def test_a_floor_is_kept_before_anything_is_bought():
    kept = ALLOCATORS["global"]([np.full(4, 100.0), np.zeros(4)], Demand(4, (1, 1), (1, 1), (4, 4)))
    assert [m.sum() for m in kept] == [3, 1]


def test_random_draws_the_same_ranks_at_every_budget_of_a_run_only_fewer():
    scores = [np.zeros(12)] * 6
    last = [12] * 6
    for amount in range(72, -1, -6):
        demand = Demand(amount, (1,) * 6, (0,) * 6, (12,) * 6, seed=4)
        ranks = [int(m.sum()) for m in ALLOCATORS["random"](scores, demand)]
        assert all(now <= before for now, before in zip(ranks, last, strict=True))
        last = ranks
    other = Demand(36, (1,) * 6, (0,) * 6, (12,) * 6, seed=5)
    first = Demand(36, (1,) * 6, (0,) * 6, (12,) * 6, seed=4)
    drawn = [[m.sum() for m in ALLOCATORS["random"](scores, demand)] for demand in (first, other)]
    assert drawn[0] != drawn[1]


def test_shuffled_has_the_multiset_of_global_within_layers_of_a_kind():
    rng = np.random.default_rng(0)
    scores = [rng.random(8) * (1 + index) for index in range(8)]
    demand = Demand(400, (10,) * 4 + (20,) * 4, (0,) * 8, (8,) * 8, seed=1)
    chosen = [int(m.sum()) for m in ALLOCATORS["global"](scores, demand)]
    shuffled = [int(m.sum()) for m in ALLOCATORS["shuffled"](scores, demand)]
    assert shuffled != chosen
    assert sorted(shuffled[:4]) == sorted(chosen[:4]) and sorted(shuffled[4:]) == sorted(chosen[4:])
    best = ALLOCATORS["shuffled"](scores, demand)[7]
    assert scores[7][best].min(initial=9e9) >= scores[7][~best].max(initial=-1)


def ranks_of(rule, scores, demand):
    return [int(mask.sum()) for mask in ALLOCATORS[rule](scores, demand)]


def flat(weights, ranks=12):
    return [np.full(ranks, float(weight)) for weight in weights]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.integers(1, 50), min_size=1, max_size=8), total=st.integers(0, 60),
)
def test_proportional_gives_whole_quotas_and_then_the_largest_remainders(weights, total):
    """Hamilton's method, from its definition, where no cap is in the way."""
    layers = len(weights)
    got = ranks_of("proportional", flat(weights, 60), Demand(total, (1,) * layers, (0,) * layers, (60,) * layers))
    due = [total * weight / sum(weights) for weight in weights]
    expected = [total * weight // sum(weights) for weight in weights]
    order = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % sum(weights)), expected[i], i))
    for index in order[: total - sum(expected)]:
        expected[index] += 1
    assert got == expected and all(abs(g - d) < 1 for g, d in zip(got, due, strict=True))


def test_proportional_hands_on_what_a_cap_frees_and_keeps_floors():
    assert ranks_of("proportional", flat([8, 1, 1]), Demand(20, (1,) * 3, (0,) * 3, (12,) * 3)) == [12, 4, 4]
    assert ranks_of("proportional", flat([8, 2, 1]), Demand(18, (1,) * 3, (0,) * 3, (12,) * 3)) == [12, 4, 2]
    assert ranks_of("proportional", flat([10, 1, 0]), Demand(12, (1,) * 3, (2,) * 3, (12,) * 3)) == [8, 2, 2]
    # no weight, no rank, until all others are full
    assert ranks_of("proportional", flat([5, 1, 0]), Demand(24, (1,) * 3, (0,) * 3, (12,) * 3)) == [12, 12, 0]
    assert ranks_of("proportional", flat([5, 0, 0]), Demand(18, (1,) * 3, (0,) * 3, (12,) * 3)) == [12, 3, 3]
    assert ranks_of("proportional", flat([-3, -1]), Demand(8, (1,) * 2, (0,) * 2, (12,) * 2)) == [4, 4]


def test_proportional_means_ranks_also_when_the_budget_counts_parameters():
    got = ranks_of("proportional", flat([2, 1, 1]), Demand(20 * 4 + 10 * 2 + 30 * 2, (20, 10, 30), (0,) * 3, (12,) * 3))
    assert got == [4, 2, 2]
    got = ranks_of("proportional", flat([2, 1]), Demand(12, (1, 1), (0, 0), (12, 12), multiple_of=4))
    assert got == [8, 4]


def test_grouped_gives_all_layers_of_a_group_one_rank_and_the_rest_to_single_ones():
    rng = np.random.default_rng(0)
    groups = (0, 1, 2) * 4
    scores = [rng.random(8) * (1 + group) for group in groups]
    for total, costs in ((40, (1,) * 12), (41, (1,) * 12), (43, (1,) * 12), (777, (10, 20, 15) * 4)):
        demand = Demand(total, costs, (0,) * 12, (8,) * 12, groups=groups)
        got = ranks_of("grouped", scores, demand)
        spread = [max(got[g::3]) - min(got[g::3]) for g in range(3)]
        assert sorted(spread)[:2] == [0, 0] and max(spread) <= 1
        assert sum(rank * cost for rank, cost in zip(got, costs, strict=True)) > total - min(costs)
        if total == 40:
            assert max(spread) == 0 and got[2] > got[0]
    alone = Demand(40, (1,) * 12, (0,) * 12, (8,) * 12)
    assert ranks_of("grouped", scores, alone) == ranks_of("global", scores, alone)


def test_the_groups_of_a_plan_are_the_module_types():
    names = ["h.0.attn.q", "h.0.attn.v", "h.1.attn.q", "h.1.attn.v", "pooler"]
    plan = RankBudget(ranks=4).resolve([LayerShape(name, 4, 4, 2) for name in names])
    assert plan.groups == (0, 1, 0, 1, 2) == Demand.at(plan, 1).groups
