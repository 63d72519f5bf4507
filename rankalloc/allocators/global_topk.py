"""Global top-k: the triplets with the highest scores over all layers stay.

AdaLoRA's rule (Zhang et al., ICLR 2023, arXiv 2303.10512, eq. 6) made exact: ties never prune
more than asked, floors and caps hold, and a budget in parameters or bytes buys by score per cost,
the greedy rule of the knapsack problem (Dantzig, 1957).
"""

from __future__ import annotations

from .base import Demand, Kept, Scores, fill


def allocate(scores: Scores, demand: Demand) -> Kept:
    """Keep the triplets of the highest score per cost; see :func:`~rankalloc.allocators.base.fill`."""
    return fill(scores, demand, lambda blocks: blocks.score / blocks.cost)
