"""A fresh triplet has no past: whatever the optimizer, what it remembers of the slot is forgotten."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.methods.rules.fresh import refresh
from tests.support.optimizers import EIGHT_BIT, OPTIMIZERS

MOVING = {"elalora": "svd", "increlora": "svd", "l1ra": "gate"}
EVERY = {**OPTIMIZERS, **{f"bitsandbytes' {name}": make for name, make in EIGHT_BIT.items()}}


def with_fresh_triplets(make, method, budget=12):
    """A run stopped right after the first allocation that brought triplets; {adapter: mask (r,) of those that came}."""
    torch.manual_seed(0)
    # factors of 4096 numbers and more, so that bitsandbytes keeps them in 8 bits
    model = nn.Sequential(nn.Linear(640, 660), nn.Tanh(), nn.Linear(660, 640))
    adapters = ra.attach(model, rank=10, alpha=10, init=MOVING[method], dropout=0.0)
    optimizer = make(adapters.parameters())
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    schedule = ra.RankBudget(ranks=budget, warmup=0.1, freeze=0.2, every=2)
    controller = ra.RankController(adapters, schedule, total_steps=40, method=method)
    for step in range(30):
        before = [adapter.kept.clone() for adapter in adapters]
        x = torch.randn(4, 640, generator=torch.Generator().manual_seed(step))
        F.mse_loss(model(x), x.sin()).backward()
        controller.observe()
        optimizer.step()
        if method == "l1ra":  # the penalty takes a hundred steps to close gates
            next(iter(adapters)).lam.data[:2] = 0.0
        controller.update(optimizer)
        optimizer.zero_grad()
        fresh = {adapter: adapter.kept & ~was for adapter, was in zip(adapters, before, strict=True)}
        if any(mask.any() for mask in fresh.values()):
            return model, adapters, optimizer, fresh
    raise AssertionError("no triplet ever came")


@pytest.mark.parametrize("method", MOVING)
@pytest.mark.parametrize("name", EVERY)
def test_a_fresh_triplet_does_not_move_before_it_has_a_gradient(name, method):
    _, adapters, optimizer, fresh = with_fresh_triplets(EVERY[name], method)
    rows = {adapter: adapter.Q[mask].clone() for adapter, mask in fresh.items()}
    columns = {adapter: adapter.P[:, mask].clone() for adapter, mask in fresh.items()}
    for parameter in adapters.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for adapter, mask in fresh.items():
        torch.testing.assert_close(adapter.Q[mask], rows[adapter], rtol=0, atol=1e-6)
        torch.testing.assert_close(adapter.P[:, mask], columns[adapter], rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", ["P", "Q"])
@pytest.mark.parametrize("name", [name for name in EVERY if "adafactor" in name])
def test_a_factored_moment_forgets_the_slot_and_keeps_what_it_knows_of_the_others(name, factor):
    """Adafactor remembers a mean over rows and one over columns; the one that counts triplets is cleared."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20))
    adapters = ra.attach(model, rank=6)
    optimizer = EVERY[name](adapters.parameters())
    for step in range(3):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (adapter,) = adapters
    state = optimizer.state[getattr(adapter, factor)]
    keys = ("exp_avg_sq_row", "row_var") if factor == "Q" else ("exp_avg_sq_col", "col_var")
    others = {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor) and key not in keys}
    (before,) = [value.flatten().clone() for key, value in state.items() if key in keys]
    slots = torch.tensor([False, True, False, False, True, False])
    refresh(adapter, slots, optimizer, torch.Generator())
    (after,) = [value.flatten() for key, value in state.items() if key in keys]
    assert (before > 0).all() and (after[slots] == 0).all() and torch.equal(after[~slots], before[~slots])
    for key, value in others.items():
        forgotten = value.shape == getattr(adapter, factor).shape  # a first moment, elementwise
        assert torch.equal(state[key], value) or forgotten, key
