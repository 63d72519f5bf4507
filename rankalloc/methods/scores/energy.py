"""Energy: (lam_i ‖P_:i‖ ‖Q_i:‖)², the squared Frobenius norm of the triplet's part of ΔW / s.

In the canonical basis it is σ², and energies add: what an allocation drops is exactly ‖ΔW − ΔW'‖²_F / s², so the
highest sum that the budget buys is the best approximation of all updates together (Eckart and Young, 1936; per
cost under a budget in parameters or bytes). No state, no gradients. Known weakness: the loss may care little for a
large update and much for a small one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .magnitude import Magnitude


class Energy(Magnitude):
    """Squared norm of each triplet's own part of the update; see the module docstring."""

    name = "energy"
    any_basis = False

    def values(self) -> Sequence[torch.Tensor]:
        return [value.square() for value in super().values()]
