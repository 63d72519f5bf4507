"""SoRA: gates that a proximal step drives to zero, with a threshold that meets the budget.

Ding et al., EMNLP 2023 (arXiv 2311.11696): ΔW = s·P diag(g) Q with P = 0, Q random, g ~ N(0, 1) at the
start. After the optimizer's step on g, the proximal step of the L1 norm (their eq. 6):

    g ← sign(g) · max(|g| − τ, 0)

with a fixed τ (``threshold``). Budget-true at each allocation: τ is the largest |g| among the triplets that
the budget does not buy, so that exactly the others stay, each shrunk by τ. After the freeze gates train
freely. The published code also zeroes |g| < τ after shrinking; the formula does not, nor does this.

Cost: no state, one pass over r numbers a layer a step. Known weakness: the shrinkage also takes from the
gates that stay, and |g| says nothing of the sizes of P and Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...options import number
from .base import Arrays, Rule


class Sora(Rule):
    """Proximal gates; the formula is in the module docstring.

    Args:
        threshold: τ of every step between allocations, at least 0.

    Raises:
        ConfigError: the threshold is no number of at least 0.
    """

    name = "sora"

    def __init__(self, *args: Any, threshold: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.threshold = number("threshold", threshold)
        self._gates: Arrays = []

    @torch.no_grad()
    def after_step(self, step: int, frozen: bool) -> None:
        if self.threshold and not frozen:
            self._shrink(self.threshold)

    def preferences(self, values: Arrays, live: Sequence[np.ndarray], step: int) -> Arrays:
        self._gates = values
        return values

    @torch.no_grad()
    def allocated(
        self, before: Sequence[torch.Tensor], step: int, optimizer: torch.optim.Optimizer | None
    ) -> None:
        kept = np.concatenate([adapter.kept.cpu().numpy() for adapter in self.adapters])
        dropped = np.concatenate(self._gates)[~kept]
        if len(dropped) and dropped.max() > 0:
            self._shrink(float(dropped.max()))

    def _shrink(self, threshold: float) -> None:
        for adapter in self.adapters:
            adapter.lam.copy_(torch.sign(adapter.lam) * (adapter.lam.abs() - threshold).clamp_min(0.0))
