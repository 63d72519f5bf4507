"""Highest score first, regardless of cost: for rules whose preferences are an order, not amounts.

Blocks are bought in the order of their preference; a block that no longer fits is skipped, as in every rule.
"""

from __future__ import annotations

from .base import Demand, Kept, Scores, fill


def allocate(scores: Scores, demand: Demand) -> Kept:
    """Keep the triplets of the highest scores; see :func:`~rankalloc.methods.allocators.base.fill`."""
    return fill(scores, demand, lambda blocks: blocks.score)
