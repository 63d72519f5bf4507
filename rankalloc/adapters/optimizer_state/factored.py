"""Adafactor's second moments of a matrix: the means over its columns and over its rows (arXiv 1804.04235, algorithm 4).

    v̂_ij = row_i · col_j / mean(row)

The factor that counts triplets loses and turns with them; the other one is a mean over them and stays. To forget a
triplet, its entry in the counting factor becomes zero: v̂ is then zero there and what it was everywhere else.
"""

from __future__ import annotations

import torch

from ..triplets import selected
from .base import Entry, Format, Turn

# transformers' names, and torch's
_ROWS, _COLUMNS = ("exp_avg_sq_row", "row_var"), ("exp_avg_sq_col", "col_var")


class Factored(Format):
    """One of the two factors, (d,) or with the lost dimension kept as 1."""

    def claims(self, entry: Entry) -> bool:
        return entry.parameter.dim() == 2 and entry.key in (*_ROWS, *_COLUMNS)

    def select(self, entry: Entry, index: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self._counts_triplets(entry):
            return {}
        own = 0 if entry.key in _ROWS else 1
        return {entry.key: selected(entry.value, (own if entry.value.dim() == 2 else 0,), index)}

    def turned(self, entry: Entry, turn: Turn) -> dict[str, torch.Tensor]:
        if not self._counts_triplets(entry):
            return {}
        matrix, flat = turn(entry.factor, True, torch.float64), entry.value.double().flatten()
        new = matrix @ flat if entry.factor == "Q" else flat @ matrix
        return {entry.key: new.reshape(entry.value.shape)}

    def forget(self, entry: Entry, triplets: torch.Tensor) -> None:
        if self._counts_triplets(entry):
            entry.value.view(-1)[triplets.to(entry.value.device)] = 0

    def _counts_triplets(self, entry: Entry) -> bool:
        """Triplets are the rows of Q, the columns of P, and both of the core."""
        return (0 if entry.key in _ROWS else 1) in entry.dims
