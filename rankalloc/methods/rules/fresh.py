"""Fresh triplets: new directions in slots that an adapter holds but does not use."""

from __future__ import annotations

import math

import torch

from ...adapters import optimizer_state
from ...adapters.triplets import Triplets


@torch.no_grad()
def refresh(
    adapter: Triplets, slots: torch.Tensor, optimizer: torch.optim.Optimizer | None, generator: torch.Generator
) -> None:
    """Put new directions, orthogonal to the live ones, into ``slots`` (r,) bool; ΔW stays what it is.

    Sizes are those of the adapter's initialisation: with "svd" λ = 0 and both P and Q drawn, with "gate"
    and "lora" λ = 1, P = 0 and only Q drawn. What the optimizer remembers of the slots is forgotten.
    """
    if not slots.any():
        return
    old = adapter.kept & ~slots
    count = int(slots.sum())
    gate = adapter.init in ("gate", "lora")
    deviation = 1 / math.sqrt(3 * adapter.layout.fan_in(adapter.d_in)) if gate else 0.02
    drawn = torch.randn(count, adapter.d_in, generator=generator, dtype=torch.float64) * deviation
    adapter.layout.blank(adapter.base_layer, drawn)
    adapter.Q[slots] = _orthogonal(drawn.to(adapter.Q.device), adapter.Q[old]).to(adapter.Q.dtype)
    if gate:
        adapter.P[:, slots] = 0.0
        adapter.lam[slots] = 1.0
    else:
        drawn = torch.randn(count, adapter.d_out, generator=generator, dtype=torch.float64) * deviation
        adapter.P[:, slots] = _orthogonal(drawn.to(adapter.P.device), adapter.P[:, old].T).T.to(adapter.P.dtype)
        adapter.lam[slots] = 0.0
    if optimizer is not None:
        optimizer_state.forget(adapter, optimizer, slots)


def _orthogonal(drawn: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """``drawn`` (n, d) without its part in the span of ``old`` (m, d), orthogonal to each other, each row as
    long as it was drawn."""
    basis = torch.linalg.qr(torch.cat([old.double(), drawn]).T).Q[:, len(old):]
    return basis.T * drawn.norm(dim=1, keepdim=True)
