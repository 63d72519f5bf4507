"""Weight magnitude: |lam_i| ‖P_:i‖ ‖Q_i:‖, the Frobenius norm of the triplet's part of ΔW / s.

No state, no gradients. In the canonical basis it is the singular value of P Λ Q. Known weakness: in any
other basis two large triplets may cancel, and size is not importance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import Score


class Magnitude(Score):
    """Norm of each triplet's own part of the update; see the module docstring."""

    name = "magnitude"
    any_basis = True

    @torch.no_grad()
    def values(self) -> Sequence[torch.Tensor]:
        return [
            adapter.lam.float().abs() * adapter.left().float().norm(dim=0) * adapter.Q.float().norm(dim=1)
            for adapter in self.adapters
        ]
