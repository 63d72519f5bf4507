"""What rules that grow and move ranks share: a total that the budget fixes, and triplets that come fresh."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from .base import Arrays, Rule
from .fresh import refresh


class Moving(Rule, ABC):
    """Ranks start equal at ``asked(0)`` and then move; a subclass decides which triplets leave and which layers grow.

    An adapter's rank is its room: live triplets occupy some of its slots, the others are zero throughout and
    cost no gradient. A triplet that comes (back) starts in a fresh direction orthogonal to the live ones.
    """

    pins_dropped = True

    def asked(self, step: int) -> int:
        return self.plan.target

    def preferences(self, values: Arrays, live: Sequence[np.ndarray], step: int) -> Arrays:
        if step == 0:
            return [-np.arange(len(mask), dtype=float) for mask in live]  # equal ranks everywhere
        return self.moves(values, live, step)

    @abstractmethod
    def moves(self, values: Arrays, live: Sequence[np.ndarray], step: int) -> Arrays:
        """Per layer (r,): the order in which triplets and empty slots are bought, highest first."""

    @torch.no_grad()
    def allocated(
        self, before: Sequence[torch.Tensor], step: int, optimizer: torch.optim.Optimizer | None
    ) -> None:
        for index, (adapter, was) in enumerate(zip(self.adapters, before, strict=True)):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_000_003 + index)
            refresh(adapter, adapter.kept & ~was, optimizer, generator)


def places(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) in the order of ``values``; equal values get equal numbers."""
    values = np.asarray(values, float)
    return np.searchsorted(np.unique(values), values) / max(1, len(values))


def empty_slots(live: np.ndarray) -> np.ndarray:
    """(r,): the place of each empty slot among its layer's empty ones, 0 first; -1 for a live one."""
    return np.where(live, -1, np.cumsum(~live) - 1)
