"""Weighted energy: |lam_i| times the moving average of |lam_i · ∂L/∂lam_i|.

In the canonical basis that is σ² weighted by how strongly the loss has pulled at it. The two parts mend each
other's fault: energy alone does not see what the loss makes of an update, and the first-order change alone vanishes
with the gradient, when a triplet that is needed has been learned. Where Λ stays 1, |lam_i| is ‖P_i‖‖Q_i‖. Found on
planted ranks (studies/planted), not taken from a paper. State: r numbers a layer. Known weakness: a sum of such scores
is no estimate of any loss, so a budget in parameters buys by a rule of thumb.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .first_order import FirstOrder


class WeightedEnergy(FirstOrder):
    """|lam| times the first-order score; see the module docstring."""

    name = "weighted-energy"
    any_basis = False

    @torch.no_grad()
    def values(self) -> Sequence[torch.Tensor]:
        return torch._foreach_mul(self.average, [adapter.sizes() for adapter in self.adapters])
