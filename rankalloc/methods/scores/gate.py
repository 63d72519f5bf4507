"""The size of a gate: |λ|, for methods that train λ as a gate between two factors.

Ding et al., EMNLP 2023 (SoRA, arXiv 2311.11696). State: none. Known weakness: the factors' own sizes do
not count, and a small gate between large factors may carry more than a large one between small factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import Score


class Gate(Score):
    """|λ|; the module docstring says more."""

    name = "gate"

    @torch.no_grad()
    def values(self) -> Sequence[torch.Tensor]:
        return [adapter.lam.abs() for adapter in self.adapters]
