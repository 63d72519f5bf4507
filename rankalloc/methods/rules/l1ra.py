"""L1RA: an L1 penalty closes gates, and the ranks it frees go where every gate is wide open.

Singh et al., 2025 (arXiv 2509.04884): ΔW = s·P diag(g) Q with P = 0, Q random and g = 1 at the start, g held in
[0, 1]. The penalty ``weight``·Σ|g| pulls every gate down; the total stays the budget. At each allocation the
triplets whose gate has closed leave, and as many come to the layers whose smallest gate is the largest, one a
layer before any gets a second, with g = 1, P = 0 and a Q orthogonal to the live ones.

Cost: no state. Known weakness: until gates close nothing moves, so ``weight`` and the length of the run decide
together how adaptive it is; with an optimizer that rescales gradients (Adam) the weight matters less than its sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...options import number
from .base import Arrays
from .moving import Moving, empty_slots, places


class L1ra(Moving):
    """Gates under an L1 penalty; the module docstring says how.

    Args:
        weight: of the penalty, at least 0.

    Raises:
        ConfigError: the weight is no number of at least 0.
    """

    name = "l1ra"

    def __init__(self, *args: Any, weight: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight = number("weight", weight)

    @torch.no_grad()
    def begin(self) -> None:
        for adapter in self.adapters:
            adapter.lam.fill_(1.0)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        for adapter in self.adapters:
            if adapter.lam.grad is not None and step <= self.plan.freeze_step:
                adapter.lam.grad.add_(adapter.lam.sign(), alpha=self.weight)

    @torch.no_grad()
    def after_step(self, step: int, frozen: bool) -> None:
        for adapter in self.adapters:
            adapter.lam.clamp_(0.0, 1.0)

    def moves(self, values: Arrays, live: Sequence[np.ndarray], step: int) -> Arrays:
        open_ = [mask & (gates > 0) for mask, gates in zip(live, values, strict=True)]
        smallest = places([
            gates[mask].min() if mask.any() else 0.0 for gates, mask in zip(values, open_, strict=True)
        ])
        return [
            np.where(
                stays, 2 + gates, np.where(mask, -1e6, own - empty_slots(mask))  # the closed ones come last of all
            )
            for mask, stays, gates, own in zip(live, open_, values, smallest, strict=True)
        ]
