"""First-order group importance: the change of the loss when a triplet is taken away.

L depends on P_:i, lam_i and Q_i: only through their product, so P_:i·∂L/∂P_:i = lam_i ∂L/∂lam_i =
Q_i:·∂L/∂Q_i: exactly, and the first-order change of removing triplet i is |lam_i ∂L/∂lam_i| (Molchanov
et al., CVPR 2019, arXiv 1906.10771, applied to a triplet as one group). Averaged over the steps.

State: r numbers a layer. Known weakness: at a minimum the gradient vanishes, and with it the score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import AveragedScore
from .derivatives import products


class FirstOrder(AveragedScore):
    """Moving average of |lam · ∂L/∂lam|; see the module docstring."""

    name = "first-order"
    any_basis = True

    def now(self) -> Sequence[torch.Tensor]:
        return torch._foreach_abs(products(self.adapters))  # no size is needed for the product
