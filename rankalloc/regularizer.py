"""AdaLoRA's orthogonality regulariser, added to the gradients instead of the loss.

    R = mean over all P and Q of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F        (both reference codes; the
                                                                     paper squares the norm)
    ∂R/∂P = 2 P (PᵀP − I) / ‖PᵀP − I‖_F / (number of matrices)

Because the gradient is added once, right before the optimizer's step, the regulariser acts whatever
computes the loss, and gradient accumulation does not multiply it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .adapter import Adapter


@torch.no_grad()
def add_orthogonal_gradient(adapters: Sequence[Adapter], weight: float, live_only: bool = False) -> None:
    """Add ``weight`` · ∂R/∂P and ∂R/∂Q to the gradients that exist; factors without one are left alone.

    ``live_only`` counts kept triplets alone, as if the dropped ones were out of memory already.
    """
    held = [a for a in adapters if (a.live_rank if live_only else a.rank)]
    factors = [(a.P, False, a.kept) for a in held] + [(a.Q, True, a.kept) for a in held]
    for factor, is_rows, kept in factors:
        if factor.grad is None:
            continue
        gram = factor @ factor.T if is_rows else factor.T @ factor
        gram.diagonal().sub_(1.0)
        if live_only:
            gram.mul_(kept).mul_(kept[:, None])
        gram.mul_(2 * weight / (len(factors) * torch.linalg.matrix_norm(gram).clamp_min(1e-12)))
        factor.grad.add_(gram @ factor if is_rows else factor @ gram)


@torch.no_grad()
def orthogonal_penalty(adapters: Sequence[Adapter]) -> torch.Tensor:
    """R itself, a scalar."""
    norms = []
    for adapter in adapters:
        for gram in (adapter.P.T @ adapter.P, adapter.Q @ adapter.Q.T):
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return torch.stack(norms).mean()
