"""Rules equal their formulas, and move ranks as they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.errors import ConfigError, NotAdaptedError, RankallocError
from rankalloc.methods.rules import RULES
from rankalloc.methods.rules.fresh import refresh
from tests.support.models import logits_of, make_mlp, tensors_of
from tests.support.training import train_mlp


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x[:, :8].sin()


def double_adapters(method: str, rank: int = 4, scale: str = "lora"):
    model = make_mlp().double()
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=rank, alpha=6, init=ra.METHODS[method].init, scale=scale)
    for adapter in adapters:
        for factor in (adapter.P, adapter.lam, adapter.Q):
            factor.data = factor.data.double()
        adapter.P.data.normal_(0, 0.1)
    return model, adapters


def transcription(model, adapters):
    """Frozen (W, b) of each layer, and copies of (P, λ, Q) that learn on their own."""
    layers = [(a.base_layer.weight, a.base_layer.bias) for a in adapters]
    factors = [
        [factor.detach().clone().requires_grad_(factor.requires_grad) for factor in (a.P, a.lam, a.Q)]
        for a in adapters
    ]
    return layers, factors


def loop(controller, model, optimizer, steps):
    for step in range(controller.step + 1, steps + 1):
        x, y = batch(step)
        F.mse_loss(model(x), y).backward()
        controller.observe()
        optimizer.step()
        controller.update(optimizer)
        optimizer.zero_grad()


def assert_factors(adapters, factors):
    for adapter, (p, lam, q) in zip(adapters, factors, strict=True):
        torch.testing.assert_close(adapter.P.data, p.data, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(adapter.lam.data, lam.data, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(adapter.Q.data, q.data, rtol=1e-9, atol=1e-12)


def test_sora_is_its_formula_step_by_step():
    """y = Wx + s·P(g ⊙ Qx); Adam on all; then g ← sign(g) max(|g| − τ, 0), with τ the largest |g| that the
    budget does not buy whenever ranks are allocated."""
    model, adapters = double_adapters("sora")
    layers, factors = transcription(model, adapters)
    scaling, threshold, steps = adapters.scaling, 5e-3, 40
    budget = ra.RankBudget(ranks=5, warmup=0.5, freeze=0.25, every=3)
    controller = ra.RankController(adapters, budget, steps, "sora", threshold=threshold, shrink=False)
    loop(controller, model, torch.optim.Adam(adapters.parameters(), lr=1e-2), steps - 10)

    optimizer = torch.optim.Adam([f for triple in factors for f in triple], lr=1e-2)
    masks = 0
    for step in range(1, steps - 9):
        x, y = batch(step)
        h = x
        for index, ((weight, bias), (p, gate, q)) in enumerate(zip(layers, factors, strict=True)):
            h = h @ weight.T + bias + scaling * ((h @ q.T) * gate) @ p.T
            h = h.tanh() if index < len(layers) - 1 else h
        F.mse_loss(h, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            gates = [triple[1] for triple in factors]
            for gate in gates:
                gate.copy_(gate.sign() * (gate.abs() - threshold).clamp(min=0))
            if step == 30 or step > 20 and (step - 20) % 3 == 0:
                keep = controller.schedule.asked(step)
                size = torch.cat(gates).abs().sort(descending=True).values
                for gate in gates:
                    gate.copy_(gate.sign() * (gate.abs() - size[keep]).clamp(min=0))
                masks += 1
    assert masks == 4 and sum(adapters.ranks().values()) == 5
    assert_factors(adapters, factors)
    assert sum(int((adapter.lam != 0).sum()) for adapter in adapters) == 5


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("scale", ["lora", "rslora"])
def test_dylora_is_its_formula_step_by_step(frozen, momentum, scale):
    """y = Wx + (α/b)·P[:, :b] Q[:b] x for the b drawn in this step, or α/√b; only what was drawn moves."""
    model, adapters = double_adapters("dylora", scale=scale)
    layers, factors = transcription(model, adapters)
    controller = ra.RankController(adapters, ra.RankBudget(fraction=1.0), 30, "dylora", frozen=frozen, seed=7)
    drawn = [controller.state.rule.drawn(step) for step in range(1, 31)]
    assert set(drawn) == {1, 2, 3, 4}
    loop(controller, model, torch.optim.SGD(adapters.parameters(), lr=0.05, momentum=momentum), 30)

    optimizer = torch.optim.SGD([f for p, _, q in factors for f in (p, q)], lr=0.05, momentum=momentum)
    for step, b in enumerate(drawn, start=1):
        x, y = batch(step)
        h = x
        for index, ((weight, bias), (p, _, q)) in enumerate(zip(layers, factors, strict=True)):
            h = h @ weight.T + bias + 6 / (b if scale == "lora" else b**0.5) * (h @ q[:b].T) @ p[:, :b].T
            h = h.tanh() if index < len(layers) - 1 else h
        F.mse_loss(h, y).backward()
        if frozen:
            for p, _, q in factors:
                p.grad[:, : b - 1], q.grad[: b - 1] = 0, 0
        before = [(p.detach().clone(), q.detach().clone()) for p, _, q in factors]
        optimizer.step()
        optimizer.zero_grad()
        learns = torch.zeros(4, dtype=torch.bool)
        learns[b - 1 if frozen else 0 : b] = True
        with torch.no_grad():
            for (p, _, q), (p0, q0) in zip(factors, before, strict=True):
                p.copy_(torch.where(learns, p, p0))
                q.copy_(torch.where(learns[:, None], q, q0))
    assert_factors(adapters, factors)


@pytest.mark.parametrize("scale", ["lora", "rslora"])
def test_a_dylora_run_can_be_used_saved_and_loaded_at_every_rank(tmp_path, scale):
    model = make_mlp()
    adapters = ra.attach(model, rank=4, init="lora", scale=scale)
    controller = ra.RankController(adapters, ra.RankBudget(fraction=1.0), 20, "dylora")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    train_mlp(model, controller, optimizer, 20)
    controller.finish()
    whole = logits_of(model)
    model.train()
    again = model(torch.randn(5, 16, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-6)  # the last bit of a sum is the fused layer's own
    first = adapters.modules["0"]
    p, q = first.P.detach(), first.Q.detach()
    seen = []
    for rank in range(5):
        with ra.at_rank(adapters, rank):
            assert set(adapters.ranks().values()) == {rank}
            scaling = adapters.alpha / max(1, rank) ** {"lora": 1, "rslora": 0.5}[scale]
            expected = scaling * p[:, :rank] @ q[:rank] if rank else 0
            torch.testing.assert_close(first.delta_weight(), torch.as_tensor(expected) + torch.zeros(24, 16))
            ra.save(adapters, tmp_path / str(rank), "compact")
            here = logits_of(model)
        again = make_mlp()
        assert sum(ra.load(again, tmp_path / str(rank)).ranks().values()) == 3 * rank
        torch.testing.assert_close(logits_of(again), here)
        seen.append(here)
    assert torch.equal(logits_of(model), whole) and torch.equal(seen[4], whole)
    assert not any(torch.equal(a, b) for a, b in zip(seen[:-1], seen[1:], strict=True))
    with ra.at_rank(adapters, {"0": 1}):
        assert list(adapters.ranks().values()) == [1, 4, 4]


def test_dylora_is_cut_to_its_budget_from_the_end_at_the_freeze():
    model = make_mlp()
    adapters = ra.attach(model, rank=4, init="lora")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=7), 20, "dylora")
    train_mlp(model, controller, optimizer, 14)
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    assert [adapter.rank for adapter in adapters] == list(adapters.ranks().values()) and len(set(adapters.ranks())) > 1
    for name, adapter in adapters.modules.items():
        assert torch.equal(adapter.lam, torch.full((adapter.rank,), 4 / adapter.rank)), name
    train_mlp(model, controller, optimizer, 20)
    assert controller.finish().final_ranks == list(adapters.ranks().values())
    assert sum(adapters.ranks().values()) == 7
    assert any(not torch.equal(tensor, before[name]) for name, tensor in tensors_of(model).items())


def test_dylora_says_when_it_cannot_draw():
    model = make_mlp().eval()
    adapters = ra.attach(model, rank=4, init="lora")
    controller = ra.RankController(adapters, ra.RankBudget(fraction=1.0), 20, "dylora")
    model(torch.randn(2, 16)).sum().backward()
    with pytest.raises(NotAdaptedError, match="model.train"):
        controller.observe()


def test_only_nested_adapters_are_cut_from_the_end(mlp):
    adapters = ra.attach(make_mlp(), rank=2, init="lora")
    for never in (ra.attach(mlp, rank=2), adapters):
        with pytest.raises(RankallocError, match="dylora"), ra.at_rank(never, 1):
            pass
    ra.RankController(adapters, ra.RankBudget(fraction=1.0), 20, "dylora")
    for wrong in (-1, 1.5, True, {"nowhere": 1}, 3, {"0": 3}):
        with pytest.raises(ConfigError), ra.at_rank(adapters, wrong):
            pass
    assert set(adapters.ranks().values()) == {2}


def moving(method, ranks=6, steps=40, **options):
    model = make_mlp()
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=6, init=ra.METHODS[method].init)
    budget = ra.RankBudget(ranks=ranks, every=4, warmup=0.1, freeze=0.2)
    controller = ra.RankController(adapters, budget, steps, method, **options)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=8e-2 if method == "l1ra" else 2e-2)
    return model, adapters, controller, optimizer


def empty_slots_are_zero(adapters):
    for adapter in adapters:
        empty = ~adapter.kept
        assert not adapter.P[:, empty].any() and not adapter.lam[empty].any() and not adapter.Q[empty].any()


@pytest.mark.parametrize("method", ["elalora", "l1ra"])
def test_moving_rules_hold_the_budget_from_the_first_step(method):
    model, adapters, controller, optimizer = moving(method, 7, **({"weight": 0.05} if method == "l1ra" else {}))
    assert list(adapters.ranks().values()) == [3, 2, 2]
    patterns = [list(adapters.ranks().values())]
    for step in range(1, 32):
        train_mlp(model, controller, optimizer, step)
        assert sum(adapters.ranks().values()) == 7
        empty_slots_are_zero(adapters)
        patterns.append(list(adapters.ranks().values()))
    assert len({tuple(pattern) for pattern in patterns}) > 1, "nothing moved"
    assert sum(record.returned for record in controller.trace.allocations) > 0


def test_elalora_moves_no_more_than_it_may():
    model, adapters, controller, optimizer = moving("elalora", 9, steps=80, move=0.5, per_layer=1)
    before = None
    for record in _allocations(model, controller, optimizer, 64):
        ranks = np.array(record.ranks)
        if before is not None:
            assert np.abs(ranks - before).max() <= 1
            assert record.returned <= min(3, controller.state.rule.count(record.step, 9))
        before = ranks
    assert [controller.state.rule.count(step, 9) for step in (0, 8, 36, 64)] == [4, 4, 1, 0]


def _allocations(model, controller, optimizer, steps):
    train_mlp(model, controller, optimizer, steps)
    return controller.trace.allocations


def test_elalora_takes_from_the_lowest_and_gives_to_the_highest():
    _, adapters, controller, _ = moving("elalora", 6, move=0.34, per_layer=2)
    live = [mask.numpy().copy() for mask in (a.kept for a in adapters)]
    assert [mask.sum() for mask in live] == [2, 2, 2]
    values = [np.zeros(6), np.zeros(6), np.zeros(6)]
    values[0][:2], values[1][:2], values[2][:2] = (9.0, 8.0), (5.0, 4.0), (1.0, 2.0)
    from rankalloc.methods.allocators import ALLOCATORS, Demand

    order = controller.state.rule.preferences(values, live, 4)
    kept = ALLOCATORS["ordered"](order, Demand.of(controller.schedule, 6))
    assert controller.state.rule.count(4, 6) == 2
    assert [int(mask.sum()) for mask in kept] == [4, 2, 0]


def test_increlora_grows_from_one_rank_a_layer_and_never_takes_back():
    model, adapters, controller, optimizer = moving("increlora", 11)
    assert list(adapters.ranks().values()) == [1, 1, 1]
    last = [1, 1, 1]
    for step in range(1, 41):
        train_mlp(model, controller, optimizer, step)
        ranks = list(adapters.ranks().values())
        assert all(now >= then for now, then in zip(ranks, last, strict=True))
        assert step > 32 or sum(abs(now - then) for now, then in zip(ranks, last, strict=True)) <= 3
        last = ranks
    assert sum(last) == 11 == controller.trace.allocations[-1].reached
    asked = [record.asked for record in controller.trace.allocations]
    assert asked == sorted(asked) and asked[0] == 3


def test_l1ra_gates_stay_between_zero_and_one_and_close():
    model, adapters, controller, optimizer = moving("l1ra", 9, weight=0.05)
    assert all((adapter.lam[adapter.kept] == 1).all() for adapter in adapters)
    for step in range(1, 30):
        train_mlp(model, controller, optimizer, step)
        assert all(adapter.lam.min() >= 0 and adapter.lam.max() <= 1 for adapter in adapters)


@pytest.mark.parametrize("init", ["svd", "gate"])
def test_a_fresh_triplet_is_orthogonal_changes_nothing_and_is_unknown_to_the_optimizer(init):
    adapters = ra.attach(nn.Sequential(nn.Linear(10, 12)), rank=5, init=init)
    adapter = adapters.modules["0"]
    adapter.P.data.normal_()
    adapter.lam.data.fill_(0.5)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    adapters.model(torch.randn(4, 10)).square().sum().backward()
    optimizer.step()
    slots = torch.tensor([False, True, False, True, False])
    adapter.drop(~slots, erase=True)
    before = adapter.delta_weight()
    adapter.kept.fill_(True)
    refresh(adapter, slots, optimizer, torch.Generator().manual_seed(0))
    assert torch.equal(adapter.delta_weight(), before)
    rows = F.normalize(adapter.Q.detach(), dim=1)
    assert (rows[slots] @ rows[~slots].T).abs().max() < 1e-5 and abs(rows[1] @ rows[3]) < 1e-5
    assert rows[slots].norm(dim=1).min() > 0.99
    assert not optimizer.state[adapter.Q]["exp_avg"][slots].any() and optimizer.state[adapter.Q]["exp_avg"].any()
    if init == "svd":
        columns = F.normalize(adapter.P.detach(), dim=0)
        assert (columns[:, slots].T @ columns[:, ~slots]).abs().max() < 1e-5
    # it can learn: some gradient reaches it
    adapters.model.zero_grad()
    adapters.model(torch.randn(4, 10)).square().sum().backward()
    learning = adapter.lam.grad[slots] if init == "svd" else adapter.P.grad[:, slots]
    assert learning.all()


@pytest.mark.parametrize("method, option", [
    ("sora", {"threshold": -1.0}), ("sora", {"canonical": True}), ("l1ra", {"weight": -0.1}),
    ("elalora", {"move": 2.0}), ("elalora", {"per_layer": 0}), ("sora", {"threshold": "big"}),
    ("l1ra", {"weight": None}),
    ("dylora", {"frozen": "no"}), ("matryoshka", {"weights": 1}),
    ("auto", {"canonical": "no"}), ("auto", {"beta": "x"}), ("adalora", {"beta1": True}),
    ("adalora", {"orthogonal": -1}),
])
def test_options_out_of_range_are_named(method, option):
    adapters = ra.attach(make_mlp(), rank=2, init=ra.METHODS[method].init)
    with pytest.raises(ConfigError, match=next(iter(option))):
        ra.RankController(adapters, ra.RankBudget(ranks=2), 10, method, **option)


@pytest.mark.parametrize("method, init", [("sora", "svd"), ("dylora", "svd"), ("sora", "lora"), ("dylora", "gate")])
def test_a_method_says_which_parametrisation_it_trains(method, init):
    adapters = ra.attach(make_mlp(), rank=2, init=init)
    with pytest.raises(ConfigError, match=ra.METHODS[method].init):
        ra.RankController(adapters, ra.RankBudget(ranks=2), 10, method)


def test_a_gated_start_changes_nothing_and_draws_its_gates():
    model = make_mlp()
    before = logits_of(model)
    adapters = ra.attach(model, rank=4, init="gate")
    assert torch.equal(logits_of(model), before)
    gates = torch.cat([adapter.lam.detach() for adapter in adapters])
    assert gates.std() > 0.3 and all(adapter.lam.requires_grad for adapter in adapters)


def test_every_rule_is_used_by_a_method():
    assert {method.rule for method in ra.METHODS.values()} == set(RULES)
    assert all(rule.name == name and rule.__doc__ for name, rule in RULES.items())
