"""Canonical form: the same update, true singular values, and gradients that follow."""

from __future__ import annotations

import copy

import pytest
import torch

import rankalloc as ra
from rankalloc.adapters.adapter import Adapter
from rankalloc.adapters.canonical import canonicalize, canonicalize_all
from rankalloc.errors import NotAdaptedError, RankallocError
from tests.support.models import make_mlp, randomize
from tests.support.training import train_mlp


def one_adapter(rank=4, dtype=torch.float64):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 7)).to(dtype)
    adapters = ra.attach(model, rank=rank, alpha=2.5)
    adapter = next(iter(adapters))
    adapter.to(dtype)
    randomize(adapters)
    return model, adapters, adapter


def gradients(model, adapter):
    for parameter in (adapter.P, adapter.lam, adapter.Q):
        parameter.grad = None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 10, generator=generator, dtype=torch.float64)
    y = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    (model(x) - y).square().mean().backward()
    return adapter.P.grad.clone(), adapter.lam.grad.clone(), adapter.Q.grad.clone()


def test_the_update_stays_and_its_singular_values_appear():
    _, _, adapter = one_adapter()
    before = adapter.delta_weight()
    expected = torch.linalg.svdvals(before)[:4] / adapter.scaling
    canonicalize(adapter)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(adapter.delta_weight(), before, rtol=0, atol=1e-13)
    torch.testing.assert_close(adapter.lam.data, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(adapter.P.T @ adapter.P, eye, rtol=0, atol=1e-13)
    torch.testing.assert_close(adapter.Q @ adapter.Q.T, eye, rtol=0, atol=1e-13)


def test_gradients_follow_by_the_stated_rule():
    model, _, adapter = one_adapter()
    p, _, q = gradients(model, adapter)
    change = canonicalize(adapter)
    p_new, _, q_new = gradients(model, adapter)
    torch.testing.assert_close(p @ change.p, p_new, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(change.q @ q, q_new, rtol=1e-10, atol=1e-12)


def test_a_second_time_changes_nothing_so_moments_and_scores_stay():
    _, adapters, adapter = one_adapter()
    canonicalize(adapter)
    optimizer = torch.optim.AdamW(adapters.parameters())
    for parameter in (adapter.P, adapter.lam, adapter.Q):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    canonicalize(adapter, optimizer)
    before = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    change = canonicalize(adapter, optimizer)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(change.mixing, eye, rtol=0, atol=1e-12)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            torch.testing.assert_close(value, before[parameter][key], rtol=1e-9, atol=1e-12)


def test_a_permutation_of_triplets_permutes_the_moments():
    _, adapters, adapter = one_adapter()
    canonicalize(adapter)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.0)
    for parameter in (adapter.P, adapter.lam, adapter.Q):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moment = optimizer.state[adapter.lam]["exp_avg_sq"].clone()
    with torch.no_grad():
        adapter.lam.copy_(adapter.lam.flip(0))  # now rising: the canonical order is the reverse
    canonicalize(adapter, optimizer)
    torch.testing.assert_close(optimizer.state[adapter.lam]["exp_avg_sq"], moment.flip(0), rtol=1e-9, atol=1e-15)


def test_dropped_triplets_come_last_with_singular_value_zero():
    _, _, adapter = one_adapter()
    adapter.drop(torch.tensor([False, True, False, True]))
    before = adapter.delta_weight()
    canonicalize(adapter)
    assert adapter.kept.tolist() == [True, True, False, False]
    assert (adapter.lam[2:].abs() < 1e-12).all() and (adapter.lam[:2] > 0).all()
    torch.testing.assert_close(adapter.delta_weight(), before, rtol=0, atol=1e-13)


def test_cutting_the_smallest_is_the_best_approximation():
    _, _, adapter = one_adapter()
    full = adapter.delta_weight()
    u, s, vh = torch.linalg.svd(full)
    canonicalize(adapter)
    adapter.drop(torch.arange(4) < 2)
    best = (u[:, :2] * s[:2]) @ vh[:2]
    torch.testing.assert_close(adapter.delta_weight(), best, rtol=0, atol=1e-12)


def test_rank_zero_and_equal_factors_are_fine():
    model = make_mlp()
    adapters = ra.attach(model, rank=4, ranks={"0": 0})
    for adapter in adapters:
        with torch.no_grad():
            adapter.P.fill_(0.5)  # every column the same: R is singular
            adapter.lam.fill_(1.0)
        before = adapter.delta_weight()
        change = canonicalize(adapter)
        torch.testing.assert_close(adapter.delta_weight(), before, rtol=1e-4, atol=1e-5)
        assert torch.isfinite(change.mixing).all()


@pytest.mark.parametrize("d_in, d_out, rank", [(64, 48, 8), (40, 300, 12)])
def test_the_cholesky_factor_gives_what_a_qr_gives(d_in, d_out, rank, monkeypatch):
    adapter = Adapter(torch.nn.Linear(d_in, d_out).requires_grad_(False), rank, 1.0)
    with torch.no_grad():
        adapter.lam.normal_()
    other = copy.deepcopy(adapter)
    change = canonicalize(adapter)
    monkeypatch.setattr("rankalloc.adapters.canonical._SINGULAR", 0.0)
    exact = canonicalize(other)
    for name in ("p", "lam", "q"):
        torch.testing.assert_close(getattr(change, name), getattr(exact, name), rtol=1e-9, atol=1e-12)
    for name in ("P", "lam", "Q"):
        torch.testing.assert_close(getattr(adapter, name), getattr(other, name), rtol=1e-6, atol=1e-7)


def test_adapters_of_several_ranks_at_once_are_as_each_alone():
    model = make_mlp()
    adapters = ra.attach(model, rank=4, ranks={"0": 2})
    randomize(adapters)
    alone = copy.deepcopy(list(adapters))
    changes = canonicalize_all(list(adapters))
    for adapter, other, change in zip(adapters, alone, changes, strict=True):
        expected = canonicalize(other)
        torch.testing.assert_close(change.mixing, expected.mixing, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(adapter.P, other.P, rtol=1e-6, atol=1e-7)


def test_what_cannot_be_carried_over_leaves_every_weight_alone():
    model = make_mlp()
    adapters = ra.attach(model, rank=4)
    randomize(adapters)
    optimizer = torch.optim.AdamW(adapters.parameters())
    last = list(adapters)[-1]
    optimizer.state[last.P]["strange"] = torch.zeros(3)
    before = copy.deepcopy(list(adapters))
    with pytest.raises(RankallocError, match="strange"):
        canonicalize_all(list(adapters), optimizer)
    for adapter, other in zip(adapters, before, strict=True):
        assert all(torch.equal(getattr(adapter, name), getattr(other, name)) for name in ("P", "lam", "Q", "kept"))


def test_what_cannot_be_carried_over_is_told_at_the_first_step():
    model = make_mlp()
    adapters = ra.attach(model, rank=4)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=5), 10, "singular-value", shrink=False)
    with pytest.raises(NotAdaptedError, match="canonical=False"):
        train_mlp(model, controller, _NoOptimizer(), 1)
    optimizer = torch.optim.Rprop(adapters.parameters())
    controller = ra.RankController(adapters, ra.RankBudget(ranks=5), 10, "singular-value")
    with pytest.raises(RankallocError, match="Rprop"):
        train_mlp(model, controller, optimizer, 1)


def test_a_fixed_basis_is_refused():
    model = make_mlp()
    adapters = ra.attach(model, rank=4, init="lora-fa")
    with pytest.raises(RankallocError, match="rewrites both P and Q"):
        canonicalize(next(iter(adapters)))


class _NoOptimizer:
    """Stands where a loop forgets to hand the optimizer over."""

    def step(self):
        pass

    def zero_grad(self):
        pass

    def __bool__(self):
        return False


@pytest.mark.parametrize("empty", ["nothing", "one triplet", "all of P"])
def test_plain_lora_splits_each_singular_value_and_its_gradients_follow_exactly(empty):
    """With Λ = 1: P' = Q_P U √Σ, Q' = √Σ Vᵀ Q_Qᵀ; momentum that holds the gradient holds that of the new factors."""
    model = make_mlp()
    adapter = ra.attach(model, rank=4, target_modules=["2"], init="lora").modules["2"]
    with torch.no_grad():
        adapter.P.normal_(0, 0.3)
        if empty != "nothing":
            adapter.P[:, 1 if empty == "one triplet" else slice(None)] = 0
    lengths, before = adapter.Q.norm(dim=1), adapter.delta_weight()
    sigma = adapter.singular_values().float()
    inputs = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))

    def gradients():
        model.zero_grad()
        model(inputs).square().sum().backward()
        return adapter.P.grad.clone(), adapter.Q.grad.clone()

    optimizer = torch.optim.SGD(adapter.trained(), lr=0.0, momentum=0.9)
    gradients()
    optimizer.step()  # the momentum is the gradient
    canonicalize(adapter, optimizer)
    torch.testing.assert_close(adapter.delta_weight(), before, rtol=1e-4, atol=1e-6)
    live = sigma > 1e-6
    for factor, dim in ((adapter.P, 0), (adapter.Q, 1)):
        wanted = sigma.div(adapter.scaling).sqrt()
        torch.testing.assert_close(factor.norm(dim=dim)[live], wanted[live], rtol=1e-4, atol=1e-6)
    assert not adapter.P[:, ~live].any() and torch.equal(adapter.lam, torch.ones(4))
    rms = lengths.square().mean().sqrt()
    torch.testing.assert_close(adapter.Q.norm(dim=1)[~live], rms.expand(int((~live).sum())))  # alive, as at the start
    carried = [optimizer.state[factor]["momentum_buffer"].clone() for factor in (adapter.P, adapter.Q)]
    for new, moved in zip(gradients(), carried, strict=True):
        torch.testing.assert_close(moved, new, rtol=2e-3, atol=1e-4 * float(new.abs().max()))
