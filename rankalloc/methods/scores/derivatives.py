"""How the loss changes with the size of each triplet: ∂L/∂λ, also where λ has no gradient.

P and λ act through their product alone, so λ_i ∂L/∂λ_i = P_:i · ∂L/∂P_:i whether λ is trained or not, and the same sum
is σ_i ∂L/∂σ_i for σ_i = ‖P_i‖‖Q_i‖ with both directions held. Factors of one shape are multiplied together, so that the
number of operators is that of the shapes, not of the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...adapters.triplets import Triplets


@torch.no_grad()
def products(adapters: Sequence[Triplets]) -> list[torch.Tensor]:
    """λ_i ∂L/∂λ_i, per adapter (r,) in float32; zero for a layer that took no part in this step."""
    if _have_gradients(adapters):
        return list(torch._foreach_mul([a.lam.detach().float() for a in adapters], _gradients(adapters)))
    found: dict[int, torch.Tensor] = {}
    alike: dict[Any, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for index, adapter in enumerate(adapters):
        p = adapter.P
        if p.grad is None or not p.shape[1]:
            found[index] = torch.zeros(p.shape[1], device=p.device)
        else:
            alike.setdefault((p.shape, p.dtype, p.grad.dtype, p.device), []).append((index, p.detach(), p.grad))
    for members in alike.values():
        indices, weights, gradients = zip(*members, strict=True)
        sums = (torch.stack(weights).float() * torch.stack(gradients).float()).sum(1)
        found.update(zip(indices, sums.unbind(), strict=True))
    return [found[index] for index in range(len(adapters))]


@torch.no_grad()
def derivatives(adapters: Sequence[Triplets], sizes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """∂L/∂λ_i, or ∂L/∂σ_i where the factors hold the size, per adapter (r,) in float32; zero where nothing is known.

    Args:
        sizes: λ or σ, per adapter (r,).
    """
    if _have_gradients(adapters):
        return _gradients(adapters)
    # a size of zero has a product of zero
    divisors = [torch.where(size == 0, 1.0, size) for size in sizes]
    return list(torch._foreach_div(products(adapters), divisors))


def _have_gradients(adapters: Sequence[Triplets]) -> bool:
    """Whether λ is trained, in all adapters alike."""
    return all(adapter.lam.requires_grad for adapter in adapters)


def _gradients(adapters: Sequence[Triplets]) -> list[torch.Tensor]:
    return [torch.zeros_like(a.lam).float() if a.lam.grad is None else a.lam.grad.float() for a in adapters]
