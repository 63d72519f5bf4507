"""State that knows nothing of single triplets: counts of steps, and single numbers."""

from __future__ import annotations

import torch

from .base import Entry, Format, Turn


class Counts(Format):
    """One number for the whole parameter (torch's ``step``); nothing changes."""

    def claims(self, entry: Entry) -> bool:
        return entry.value.dim() == 0

    def select(self, entry: Entry, index: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def turned(self, entry: Entry, turn: Turn) -> dict[str, torch.Tensor]:
        return {}

    def forget(self, entry: Entry, triplets: torch.Tensor) -> None:
        return
