"""Equal ranks everywhere: the control that every adaptive rule has to beat.

Every layer is given its first rank, then every layer its second, and so on; a remainder goes to
the first layers. Scores only decide which triplets of a layer stay, never how many.
"""

from __future__ import annotations

from .base import Demand, Kept, Scores, fill


def allocate(scores: Scores, demand: Demand) -> Kept:
    """Keep the best triplets of each layer, as many in each as the budget allows evenly."""
    return fill(scores, demand, lambda blocks: -blocks.position.astype(float))
