"""What every method, score and allocation rule must keep, whichever it is: read from the registries."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.methods import PLACEMENTS
from rankalloc.methods.allocators import ALLOCATORS, Demand
from rankalloc.methods.planners import PLANNERS
from rankalloc.methods.rules import RULES
from rankalloc.methods.scores import SCORES
from rankalloc.methods.scores.base import Score
from tests.support.batches import mlp_batches
from tests.support.models import assert_same, logits_of, make_mlp, prune, randomize, tensors_of
from tests.support.training import train_mlp

STEPS = 12
LONG = pytest.mark.long
LORA = [name for name, method in ra.METHODS.items() if method.lora]  # the others' contract: test_bottlenecks
BUDGETS = {"ranks": 5, "params": 230, "bytes": 900, "fraction": 0.5}


def adapted(method, budget, **options):
    """(model, adapters) attached as the method wants: at full rank, or at the ranks it plans."""
    model = make_mlp()
    torch.manual_seed(1)
    chosen = ra.METHODS[method]
    return model, ra.attach(model, rank=4, ranks=planned(model, method, budget, **options), init=chosen.init)


def planned(model, method, budget, **options):
    """The plan of a method that chooses before training, None for any other."""
    if ra.METHODS[method].when != "before":
        return None
    if method == "manual":  # which is told its ranks: uniform ones, by suffix
        options["rank_pattern"] = dict(ra.plan_ranks(model, None, budget, rank=4))
    return ra.plan_ranks(model, mlp_batches(), budget, method, rank=4, loss_fn=F.mse_loss, **options)


@pytest.mark.parametrize("method", ra.METHODS)
def test_a_method_says_what_it_is(method):
    chosen = ra.METHODS[method]
    assert chosen.name == method and chosen.allocator in ALLOCATORS
    assert chosen.score is None or chosen.score in SCORES
    assert chosen.planner is None or (chosen.planner in PLANNERS and chosen.when == "before")
    assert all((chosen.summary, chosen.source, chosen.cost, chosen.weakness)) and all(chosen.options.values())


@pytest.mark.parametrize("unit", ["ranks", "params", *(pytest.param(u, marks=LONG) for u in ("bytes", "fraction"))])
@pytest.mark.parametrize("method", LORA)
def test_a_run_ends_within_its_budget_twice_the_same(method, unit):
    given = ra.RankBudget(**{unit: BUDGETS[unit]}, every=2)
    runs = []
    for _ in range(2):
        model, adapters = adapted(method, given)
        budget = given
        if method == "uniform":
            from rankalloc.budget import budget_of

            budget = budget_of(adapters.shapes(), given)
        controller = ra.RankController(adapters, budget, STEPS, method)
        train_mlp(model, controller, torch.optim.AdamW(adapters.parameters(), lr=1e-2), STEPS)
        trace = controller.finish()
        runs.append((tensors_of(model), trace.final_ranks))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] == list(adapters.ranks().values())
    plan = given.resolve([ra.LayerShape(n, a.d_in, a.d_out, 4) for n, a in adapters.modules.items()], STEPS)
    spent = plan.spent(runs[0][1])
    assert spent <= plan.target and plan.target - spent < max(plan.costs)
    if plan.unit == "ranks":
        assert spent == plan.target


EARLY = [name for name in LORA if ra.METHODS[name].when == "before"]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("method", [name for name in EARLY if ra.METHODS[name].options])
def test_every_plan_spends_its_budget_under_every_placement_twice_the_same(method, placement):
    for given in ({"ranks": 5}, {"ranks": 8, "multiple_of": 2, "max_rank": 4}, {"params": 300, "min_rank": 1}):
        budget = ra.RankBudget(**given)
        plans = []
        for _ in range(2):
            torch.rand(1)  # the global generator decides nothing
            plans.append(planned(make_mlp(), method, budget, placement=placement, seed=3))
        assert plans[0] == plans[1] and plans[0].factors.keys() == plans[1].factors.keys()
        for name, factors in plans[0].factors.items():
            other = plans[1].factors[name]
            assert torch.equal(factors.P, other.P) and torch.equal(factors.Q, other.Q)
        plan = budget.resolve([ra.LayerShape(n, s, t, 4) for n, s, t in (("0", 16, 24), ("2", 24, 24), ("4", 24, 8))])
        ranks = list(plans[0].values())
        for_sale = [cost for cost, r, high in zip(plan.costs, ranks, plan.caps, strict=True) if r < high]
        assert 0 <= plan.target - plan.spent(ranks) < min(for_sale)
        assert all(low <= r <= high and r % plan.multiple_of == 0
                   for low, r, high in zip(plan.floors, ranks, plan.caps, strict=True))


@pytest.mark.parametrize("ranks", [0, 1, 12])
@pytest.mark.parametrize("method", EARLY)
def test_layers_without_ranks_and_with_all_of_them_train_and_travel(method, ranks, tmp_path):
    budget = ra.RankBudget(ranks=ranks)
    model, adapters = adapted(method, budget)
    controller = ra.RankController(adapters, budget, STEPS, method)
    if ranks:  # without any, nothing is left to train
        train_mlp(model, controller, torch.optim.AdamW(adapters.parameters(), lr=1e-2), STEPS)
    assert sum(adapters.ranks().values()) == ranks
    if ranks:
        assert controller.finish().final_ranks == list(adapters.ranks().values())
        ra.save(adapters, tmp_path)
        again = make_mlp()
        ra.load(again, tmp_path)
        torch.testing.assert_close(logits_of(again), logits_of(model))


CONTROLLED = [name for name, method in ra.METHODS.items() if method.when == "during"]


# every placement in the method's own basis, and the method in the other basis
CASES = [(method, {"placement": placement}) for method in CONTROLLED for placement in PLACEMENTS]
CASES += [
    (method, {"canonical": not ra.METHODS[method].canonical}) for method in CONTROLLED
    if "canonical" in ra.METHODS[method].options
]


@pytest.mark.parametrize("shrink", ["events", "freeze", False])
@pytest.mark.parametrize("method", CONTROLLED)
def test_a_run_resumes_to_the_bit_whenever_ranks_leave_memory(method, shrink):
    if shrink == "events" and ra.METHODS[method].rule != "shrink":
        adapters = ra.attach(make_mlp(), rank=4, init=ra.METHODS[method].init)
        with pytest.raises(ra.RankallocError, match="freeze"):
            ra.RankController(adapters, ra.RankBudget(ranks=5), STEPS, method, shrink=shrink)
        return
    _stop_and_go_on(method, {"shrink": shrink, "seed": 3}, ra.RankBudget(params=230, every=2))


@pytest.mark.parametrize("method, options", CASES)
def test_every_method_meets_its_budget_exactly_and_resumes_to_the_bit(method, options):
    """Placements and bases: exact budget, determinism, and a stop in the middle that changes nothing."""
    budget = ra.RankBudget(ranks=5, every=2, max_rank=4)
    adapters, controller = _stop_and_go_on(method, {"seed": 3, **options}, budget)
    assert sum(adapters.ranks().values()) == controller.trace.allocations[-1].reached == 5
    if options.get("placement") == "uniform":
        assert max(adapters.ranks().values()) - min(adapters.ranks().values()) <= 1


def _stop_and_go_on(method, options, budget):
    """Train whole, and stopped in the middle and resumed into a fresh model: the same to the bit."""

    def begin():
        model = make_mlp()
        torch.manual_seed(1)
        adapters = ra.attach(model, rank=4, init=ra.METHODS[method].init)
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
        return model, adapters, optimizer, ra.RankController(adapters, budget, STEPS, method, **options)

    model, adapters, optimizer, controller = begin()
    train_mlp(model, controller, optimizer, 6)
    saved = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
    state = controller.state_dict()
    state = {"meta": state["meta"], "tensors": {k: v.clone() for k, v in state["tensors"].items()}}
    train_mlp(model, controller, optimizer, STEPS)
    whole = tensors_of(model)

    again, adapters, optimizer, controller = begin()
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    controller.load_state_dict(state)
    train_mlp(again, controller, optimizer, STEPS)
    assert_same(whole, tensors_of(again))
    return adapters, controller


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("score", SCORES)
def test_any_score_goes_with_any_rule(score, rule, monkeypatch):
    """Combinations that no method names yet: exact, resumable to the bit."""
    like = next(method for method in ra.METHODS.values() if method.rule == rule)
    mixed = replace(like, name="mixed", score=score, canonical=False, options={})
    monkeypatch.setitem(ra.METHODS, "mixed", mixed)
    adapters, controller = _stop_and_go_on("mixed", {"seed": 3}, ra.RankBudget(ranks=5, every=2))
    assert sum(adapters.ranks().values()) == controller.trace.allocations[-1].reached == 5


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("score", SCORES)
def test_any_score_goes_with_any_allocator_over_unlike_layers(score, allocator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 8))
    adapters = ra.attach(model, rank=4, ranks={"2": 6, "4": 3})
    randomize(adapters)
    watching = SCORES[score](list(adapters))
    model(torch.randn(6, 16)).square().mean().backward()
    watching.observe()
    values = [value.double().numpy() for value in watching.values()]
    for given in ({"ranks": 7}, {"params": 400}, {"ranks": 0}, {"ranks": 13}):
        plan = ra.RankBudget(**given).resolve(adapters.shapes())
        one, two = (ALLOCATORS[allocator](values, Demand.at(plan, plan.freeze_step, seed=3)) for _ in range(2))
        assert all((a == b).all() for a, b in zip(one, two, strict=True))
        ranks = [int(mask.sum()) for mask in one]
        for_sale = [cost for cost, rank, cap in zip(plan.costs, ranks, plan.caps, strict=True) if rank < cap]
        assert 0 <= plan.target - plan.spent(ranks) < min(for_sale, default=1)


@pytest.mark.parametrize("ranks", [0, 12])
@pytest.mark.parametrize("method", CONTROLLED)
def test_nothing_and_everything_are_budgets_of_every_method(method, ranks):
    model = make_mlp()
    adapters = ra.attach(model, rank=4, init=ra.METHODS[method].init)
    budget = ra.RankBudget(ranks=ranks, every=2, freeze=0.01, shape="linear")  # at 0 ranks nothing is left to train
    controller = ra.RankController(adapters, budget, STEPS, method)
    train_mlp(model, controller, torch.optim.AdamW(adapters.parameters(), lr=1e-2), STEPS)
    assert sum(adapters.ranks().values()) == ranks


@pytest.mark.parametrize("method", CONTROLLED)
def test_every_method_takes_layers_of_unlike_shapes_and_bf16(method):
    """One wide, one tall, one of another rank, one with none, in bfloat16, on a budget in parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 8)).bfloat16()
    adapters = ra.attach(model, rank=4, ranks={"2": 6, "4": 0}, init=ra.METHODS[method].init)
    for adapter in adapters:
        for factor in (adapter.P, adapter.lam, adapter.Q):
            factor.data = factor.data.bfloat16()
    budget = ra.RankBudget(params=400, every=2)
    controller = ra.RankController(adapters, budget, STEPS, method)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    for step in range(STEPS):
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(step)).bfloat16()
        F.mse_loss(model(x), x[:, :8].sin()).backward()
        controller.observe()
        optimizer.step()
        controller.update(optimizer)
        optimizer.zero_grad()
    trace = controller.finish()
    assert 400 - 56 < adapters.num_params() <= 400 and adapters.ranks()["4"] == 0
    assert trace.final_ranks == list(adapters.ranks().values())
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in adapters.parameters())


@pytest.mark.parametrize("score", SCORES)
def test_a_score_gives_one_finite_number_a_triplet_and_comes_back_from_its_tensors(score):
    cls = SCORES[score]
    assert issubclass(cls, Score) and not inspect.isabstract(cls)
    model = make_mlp()
    adapters = list(ra.attach(model, rank=4, ranks={"2": 0}))
    one, two = cls(adapters), cls(adapters)
    for step in range(3):
        model(torch.randn(6, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        one.observe()
        for p in model.parameters():
            p.data.add_(0.01)
    values = one.values()
    assert [v.shape for v in values] == [(4,), (0,), (4,)]
    assert all(torch.isfinite(v).all() for v in values) and any(v.any() for v in values)
    assert not one.tensors() or not any(v.any() for v in two.values())
    two.load_tensors({name: tensor.clone() for name, tensor in one.tensors().items()})
    assert all(torch.equal(a, b) for a, b in zip(values, two.values(), strict=True))
    assert one.state_bytes() == sum(t.nbytes for t in one.tensors().values())


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("init", ["svd", "lora"])
def test_every_parametrisation_travels_exactly(init, layout, tmp_path):
    model = make_mlp()
    adapters = ra.attach(model, rank=4, alpha=3, init=init)
    randomize(adapters)
    if init == "lora":
        for adapter in adapters:
            adapter.lam.data.fill_(1.0)
    prune(adapters, (1, 4, 0))
    ra.save(adapters, tmp_path, layout)
    again = make_mlp()
    loaded = ra.load(again, tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    ra.merge(loaded)
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-5, atol=1e-5)
