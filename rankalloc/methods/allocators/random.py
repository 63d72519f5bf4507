"""Ranks drawn by chance that spend the same budget: the control for "does it matter where they go?"

Each layer's triplets are bought at random moments, the same at every allocation of a run, so that ranks
shrink instead of jumping about. Scores only decide which triplets of a layer stay.
"""

from __future__ import annotations

import numpy as np

from .base import Blocks, Demand, Kept, Scores, fill


def allocate(scores: Scores, demand: Demand) -> Kept:
    """Keep the best triplets of each layer, as many as chance (``demand.seed``) gives it."""

    def priority(blocks: Blocks) -> np.ndarray:
        drawn = np.empty(len(blocks.layer))
        for layer in range(len(scores)):
            mine = blocks.layer == layer
            rng = np.random.default_rng([demand.seed, layer])
            # a luck of its own for the whole layer spreads ranks more widely than one draw a triplet would
            values = rng.random() * rng.random(len(scores[layer]))[: mine.sum()]
            drawn[mine] = np.sort(values)[::-1]
        return drawn

    return fill(scores, demand, priority)
