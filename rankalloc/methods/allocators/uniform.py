"""Equal ranks everywhere: the control that every adaptive rule has to beat.

Every layer gets its first rank, then every layer its second, and so on; a remainder goes to the first layers. Scores
only decide which triplets of a layer are kept, never how many.
"""

from __future__ import annotations

from .base import Demand, Kept, Scores, fill


def allocate(scores: Scores, demand: Demand) -> Kept:
    """Keep the best triplets of each layer, equally many in each as far as the budget allows."""
    return fill(scores, demand, lambda blocks: -blocks.position.astype(float))
