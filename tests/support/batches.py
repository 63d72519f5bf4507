"""Batches for planners to look at, and what must not have changed afterwards."""

from __future__ import annotations

import random

import numpy as np
import torch

from tests.support.models import LABELS, LENGTH, VOCAB


def token_batches(count: int = 3, rows: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Padded token batches with labels, a fifth of them ignored; common tokens are more common."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = (torch.rand(rows, LENGTH, generator=generator).square() * VOCAB).long()
        mask = (torch.arange(LENGTH)[None] < torch.randint(5, LENGTH + 1, (rows, 1), generator=generator)).long()
        labels = (ids + ids.roll(1, 1)) % LABELS
        labels[torch.rand(rows, LENGTH, generator=generator) < 0.2] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def mlp_batches(count: int = 3, rows: int = 24, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x, y) of a regression for ``make_mlp``."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        x = torch.randn(rows, 16, generator=generator) * torch.logspace(0, -1.5, 16)
        pairs.append((x, torch.stack([x[:, :8].sin(), x[:, 8:].cos()]).sum(0)))
    return pairs


def state_of(model: torch.nn.Module) -> list:
    """All that a planner must leave as it was, in comparable form."""
    tensors = [(n, t.clone(), t.data_ptr()) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    grads = [(p.requires_grad, None if p.grad is None else (p.grad.clone(), id(p.grad))) for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    return [tensors, grads, hooks, modes, drawn]


def assert_unchanged(before: list, after: list) -> None:
    for (name, one, place), (_, two, other) in zip(before[0], after[0], strict=True):
        assert torch.equal(one, two) and place == other, name
    for (flag, grad), (flag_after, grad_after) in zip(before[1], after[1], strict=True):
        assert flag == flag_after and (grad is None) == (grad_after is None)
        assert grad is None or (torch.equal(grad[0], grad_after[0]) and grad[1] == grad_after[1])
    assert before[2:4] == after[2:4]
    assert torch.equal(before[4][0], after[4][0]) and before[4][1] == after[4][1]
    assert np.array_equal(before[4][2], after[4][2])
