"""AdaLoRA's orthogonality regulariser, added to the gradients instead of the loss.

    R = mean over all P and Q of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F        (both reference codes; the
                                                                     paper squares the norm)
    ∂R/∂P = 2 P (PᵀP − I) / ‖PᵀP − I‖_F / (number of matrices)

Because the gradient is added once, right before the optimizer's step, the regulariser acts whatever
computes the loss, and gradient accumulation does not multiply it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..adapters.triplets import Triplets


@torch.no_grad()
def add_orthogonal_gradient(adapters: Sequence[Triplets], weight: float, live_only: bool = False) -> None:
    """Add ``weight`` · ∂R/∂P and ∂R/∂Q to the gradients that exist; factors without one are left alone.

    Factors of one shape are taken together, so that the number of operators is that of the shapes, not of the layers.
    ``live_only`` counts kept triplets alone, as if the dropped ones were out of memory already.
    """
    held = [a for a in adapters if (a.live_rank if live_only else a.rank)]
    alike: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for adapter in held:
        for factor, is_rows in ((adapter.P, False), (adapter.Q, True)):
            if factor.grad is not None:
                key = (is_rows, factor.shape, factor.dtype, factor.grad.dtype, factor.device)
                alike.setdefault(key, []).append((factor, adapter.kept))
    for (is_rows, *_), members in alike.items():
        factors = torch.stack([factor for factor, _ in members])  # (n, r, d_in) or (n, d_out, r)
        gram = factors @ factors.mT if is_rows else factors.mT @ factors
        gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        if live_only:
            kept = torch.stack([kept for _, kept in members])
            gram.mul_(kept[:, None]).mul_(kept[:, :, None])
        norms = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(1e-12)
        gram.mul_(2 * weight / (2 * len(held) * norms))
        gradients = [factor.grad for factor, _ in members if factor.grad is not None]
        torch._foreach_add_(gradients, list(gram @ factors if is_rows else factors @ gram))


@torch.no_grad()
def orthogonal_penalty(adapters: Sequence[Triplets]) -> torch.Tensor:
    """R itself, a scalar."""
    norms = []
    for adapter in adapters:
        for gram in (adapter.P.T @ adapter.P, adapter.Q @ adapter.Q.T):
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return torch.stack(norms).mean()
