"""IncreLoRA: start with one rank a layer, and give ranks to the layers that matter most, until the budget.

Zhang et al., 2023 (arXiv 2308.12043). Between warm-up and freeze the budget rises linearly from one rank (or
the floor) a layer to the target; what each round adds goes to the layers with the highest mean score of their
live triplets, one rank a layer before any gets a second. A fresh triplet is orthogonal to the live ones and
starts at λ = 0, so the model's function does not jump.

Cost: that of its score; parameters and optimizer state of the peak rank are held from the start. Known weakness:
what is added late has few steps to learn in, and nothing that was added is ever taken back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import Arrays
from .moving import Moving, empty_slots, places


class Increlora(Moving):
    """Grows ranks where scores are highest; the module docstring says how."""

    name = "increlora"

    def asked(self, step: int) -> int:
        plan = self.plan
        one = [max(floor, min(plan.multiple_of, cap)) for floor, cap in zip(plan.floors, plan.caps, strict=True)]
        start = min(plan.spent(one), plan.target)
        if step >= plan.freeze_step:
            return plan.target
        progress = max(0, step - plan.warmup_steps) / (plan.freeze_step - plan.warmup_steps)
        asked = int(start + (plan.target - start) * progress + 1e-9)
        return max(plan.floor, asked // plan.multiple_of * plan.multiple_of if plan.unit == "ranks" else asked)

    def moves(self, values: Arrays, live: Sequence[np.ndarray], step: int) -> Arrays:
        means = places([score[mask].mean() if mask.any() else 0.0 for score, mask in zip(values, live, strict=True)])
        scale = np.split(places(np.concatenate(values)), np.cumsum([len(v) for v in values])[:-1])
        return [
            np.where(mask, 2 + place, mean - empty_slots(mask))
            for mask, place, mean in zip(live, scale, means, strict=True)
        ]
