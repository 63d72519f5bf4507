"""The regulariser's gradient is autograd's, acts whatever computes the loss, and acts once a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankalloc as ra
from rankalloc.adapters.adapter import Adapter
from rankalloc.training.regularizer import add_orthogonal_gradient, orthogonal_penalty
from tests.support.models import make_mlp, randomize


@pytest.mark.parametrize("ranks", [[4, 4, 4], [1, 4, 2], [0, 4, 0]])
def test_the_gradient_is_that_of_the_penalty(mlp, ranks):
    adapters = ra.attach(mlp, rank=4, ranks=dict(zip(["0", "2", "4"], ranks, strict=True)))
    randomize(adapters)
    factors = [f for a in adapters if a.rank for f in (a.P, a.Q)]
    expected = [0.3 * g for g in torch.autograd.grad(_penalty(adapters), factors)]
    for factor in factors:
        factor.grad = torch.full_like(factor, 0.25)
    add_orthogonal_gradient(list(adapters), 0.3)
    assert max(g.abs().max() for g in expected) > 1e-3
    for factor, gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(factor.grad - 0.25, gradient, rtol=1e-4, atol=1e-6)
    assert all(a.lam.grad is None for a in adapters)


def _penalty(adapters):
    """orthogonal_penalty, written out and differentiable; the two must agree."""
    norms = [
        torch.linalg.matrix_norm(m - torch.eye(len(m)))
        for a in adapters if a.rank for m in (a.P.T @ a.P, a.Q @ a.Q.T)
    ]
    value = torch.stack(norms).mean()
    torch.testing.assert_close(orthogonal_penalty([a for a in adapters if a.rank]), value.detach())
    return value


def test_orthonormal_factors_feel_nothing_and_give_no_nan():
    adapter = Adapter(nn.Linear(8, 8), 4, 1.0)
    nn.init.orthogonal_(adapter.P.data)
    nn.init.orthogonal_(adapter.Q.data)
    adapter.P.data = torch.eye(8)[:, :4].clone()
    for factor in (adapter.P, adapter.Q):
        factor.grad = torch.zeros_like(factor)
    add_orthogonal_gradient([adapter], 0.1)
    assert not adapter.P.grad.any() and torch.isfinite(adapter.Q.grad).all()


def test_a_factor_without_gradient_is_left_alone(mlp):
    adapters = ra.attach(mlp, rank=2)
    add_orthogonal_gradient(list(adapters), 0.1)
    assert all(p.grad is None for p in adapters.parameters())


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_accumulation_does_not_multiply_it(pieces):
    model = make_mlp()
    adapters = ra.attach(model, rank=4)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=6), total_steps=10, orthogonal=0.5)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    for part in x.chunk(pieces):
        (model(part).square().mean() / pieces).backward()
    before = [p.grad.clone() for p in adapters.parameters()]
    controller.observe()
    added = [p.grad - g for p, g in zip(adapters.parameters(), before, strict=True)]
    for p in adapters.parameters():
        p.grad = torch.zeros_like(p)
    add_orthogonal_gradient(list(adapters), 0.5)
    for got, p in zip(added, adapters.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in added) > 1e-3


def test_dropped_triplets_that_are_still_held_do_not_push_the_others_once_ranks_are_final(mlp):
    """Held at zero or taken out of memory: the rest must feel the same."""
    attached = ra.attach(mlp, rank=4)
    randomize(attached)
    adapters, small = list(attached), []
    for adapter, live in zip(adapters, (3, 0, 1), strict=True):
        keep = torch.arange(4) < live
        adapter.drop(keep)
        twin = Adapter(adapter.base_layer, live, 1.0)
        twin.P.data, twin.Q.data = adapter.P.data[:, keep].clone(), adapter.Q.data[keep].clone()
        small.append(twin)
    for adapter in [*adapters, *small]:
        adapter.P.grad, adapter.Q.grad = torch.zeros_like(adapter.P), torch.zeros_like(adapter.Q)
    add_orthogonal_gradient(adapters, 0.5, live_only=True)
    add_orthogonal_gradient(small, 0.5)
    for adapter, twin in zip(adapters, small, strict=True):
        torch.testing.assert_close(adapter.P.grad[:, adapter.kept], twin.P.grad)
        torch.testing.assert_close(adapter.Q.grad[adapter.kept], twin.Q.grad)
        assert not adapter.P.grad[:, ~adapter.kept].any() and not adapter.Q.grad[~adapter.kept].any()
