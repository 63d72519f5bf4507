"""Random ranks that spend the same budget: the control for "does it matter where they go?"

Each layer's triplets are bought at random positions in the order, the same at every allocation of a run, so that ranks
only shrink as the budget does. Scores only decide which triplets of a layer are kept.
"""

from __future__ import annotations

import numpy as np

from .base import Blocks, Demand, Kept, Scores, fill


def allocate(scores: Scores, demand: Demand) -> Kept:
    """Keep the best triplets of each layer, as many as a draw seeded by ``demand.seed`` gives it."""

    def priority(blocks: Blocks) -> np.ndarray:
        drawn = np.empty(len(blocks.layer))
        for layer in range(len(scores)):
            mine = blocks.layer == layer
            rng = np.random.default_rng([demand.seed, layer])
            # one factor for the whole layer spreads ranks more widely than a draw per triplet alone
            values = rng.random() * rng.random(len(scores[layer]))[: mine.sum()]
            drawn[mine] = np.sort(values)[::-1]
        return drawn

    return fill(scores, demand, priority)
