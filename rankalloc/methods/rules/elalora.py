"""ElaLoRA: each round, ranks move from the triplets that matter least to the layers that matter most.

Chang et al., 2025 (arXiv 2504.00254), with AdaLoRA's scores. The total is the budget from the first step on. In
each round b triplets leave: the lowest of all layers' k lowest; and b come: one for each of the b highest
of all layers' k highest, in that one's layer. b falls with the cube of the remaining schedule,

    b(t) = round(move · N · (1 − progress)³),   N live triplets,

so at most k leave and at most k come in a layer each round. A fresh triplet is orthogonal to the live ones.

Cost: that of its score. Known weakness: a fresh triplet has had ``every`` steps to earn a score and is the
first candidate of the next round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...options import integer, number
from .base import Arrays
from .moving import Moving, empty_slots, places


class Elalora(Moving):
    """Moves ranks from the lowest to the highest scores; the formula is in the module docstring.

    Args:
        move: share of the live triplets that moves in the first round, in [0, 1].
        per_layer: k, triplets that may leave, or come to, one layer in a round; at least 1.

    Raises:
        ConfigError: an option is out of its range.
    """

    name = "elalora"

    def __init__(self, *args: Any, move: float = 0.2, per_layer: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.move, self.per_layer = number("move", move, 0, 1), integer("per_layer", per_layer, 1)

    def count(self, step: int, total: int) -> int:
        """b: how many of ``total`` live triplets move after ``step``."""
        left = (self.plan.freeze_step - step) / max(1, self.plan.freeze_step - self.plan.warmup_steps)
        return round(self.move * total * min(1.0, max(0.0, left)) ** 3)

    def moves(self, values: Arrays, live: Sequence[np.ndarray], step: int) -> Arrays:
        rows = [
            (float(values[layer][slot]), layer, int(slot))
            for layer, mask in enumerate(live) for slot in np.flatnonzero(mask)
        ]
        count = self.count(step, len(rows))
        leaving = self._ends(rows)[:count]
        growing = self._ends([(-value, layer, slot) for value, layer, slot in rows])[:count]
        scale = places([value for value, _, _ in rows])
        order = [-1.0 - empty_slots(mask) for mask in live]  # a slot nobody asks for comes last
        for place, (_, layer, slot) in zip(scale, rows, strict=True):
            order[layer][slot] = 3 + place
        for _, layer, slot in leaving:
            order[layer][slot] -= 2
        free = [list(np.flatnonzero(~mask)) for mask in live]
        for position, (_, layer, _) in enumerate(growing):
            if free[layer]:
                order[layer][free[layer].pop(0)] = 3 - (position + 1) / (count + 1)
        return order

    def _ends(self, rows: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
        """The ``per_layer`` lowest of each layer, lowest first over all."""
        taken: dict[int, int] = {}
        chosen = []
        for row in sorted(rows):
            if taken.get(row[1], 0) < self.per_layer:
                taken[row[1]] = taken.get(row[1], 0) + 1
                chosen.append(row)
        return chosen
