"""Fisher importance: ½ lam_i² E[(∂L/∂lam_i)²].

The second-order change of the loss when triplet i is taken away, with the empirical Fisher information
instead of the Hessian (optimal brain damage, LeCun et al., 1989; Fisher pruning, Theis et al.,
arXiv 1801.05787). The expectation is a moving average over the steps.

State: r numbers a layer. Known weakness: gradients of whole batches underrate the information of single
examples, the more so the larger the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import LambdaScore


class Fisher(LambdaScore):
    """½ lam² times the moving average of (∂L/∂lam)²; see the module docstring."""

    name = "fisher"
    any_basis = True

    def of_gradient(self, lam: list[torch.Tensor], grad: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        return torch._foreach_mul(grad, grad)

    @torch.no_grad()
    def values(self) -> Sequence[torch.Tensor]:
        return [0.5 * a.sizes().square() * average for a, average in zip(self.adapters, self.average, strict=True)]
