"""Part "planted": one run on a problem whose ranks are known, by the training of studies/planted."""

from __future__ import annotations

from typing import Any

import torch

from ..common.part import Cell
from ..planted import training
from .arms import DOORS

PLACES = ("main mlp", "main transformer", "half mlp", "half transformer")
"""A variant and a network of studies/planted."""
TUNING_SEED = 100
"""The first seed that chooses rates; the seeds that are compared count from 0."""


def run(cell: Cell) -> dict[str, Any]:
    """Train and judge once; seeds of phase "rates" are none of those of phase "seeds".

    Raises:
        RankallocError: training diverged.
    """
    torch.set_flush_denormal(True)  # as studies/planted does: gradients become subnormal, and must cost no time
    variant, architecture = cell.place.split()
    seed = cell.seed + (TUNING_SEED if cell.phase == "rates" else 0)
    found = training.run(
        variant, architecture, training.default_method(), seed, cell.rate, cell.steps, door=DOORS[cell.arm]
    )
    kept = ("relative_error", "exact", "misplaced", "planted", "spent", "ranks", "cpu_seconds")
    return {name: found[name] for name in kept}
