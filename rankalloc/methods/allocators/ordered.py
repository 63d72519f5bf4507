"""Highest first, whatever it costs: for rules whose preferences are an order and no amounts.

Blocks are bought in the order of their preference; one that no longer fits is passed over, as in every rule.
"""

from __future__ import annotations

from .base import Demand, Kept, Scores, fill


def allocate(scores: Scores, demand: Demand) -> Kept:
    """Keep the triplets of the highest scores; see :func:`~rankalloc.methods.allocators.base.fill`."""
    return fill(scores, demand, lambda blocks: blocks.score)
