"""The ranks of global top-k, assigned to other layers: the same multiset of ranks without their placement.

If an adaptive method does equally well with its ranks shuffled, its gain is not in their placement. Ranks are permuted
only among layers of equal cost, floor and cap, so the budget stays exact.
"""

from __future__ import annotations

import numpy as np

from . import global_topk
from .base import Demand, Kept, Scores


def allocate(scores: Scores, demand: Demand) -> Kept:
    """Global top-k's ranks, permuted over the layers by ``demand.seed``; the best triplets of each layer are
    kept."""
    ranks = [int(mask.sum()) for mask in global_topk.allocate(scores, demand)]
    kinds = list(zip(demand.costs, demand.floors, demand.caps, strict=True))
    given = list(ranks)
    for kind in sorted(set(kinds)):
        layers = [index for index, other in enumerate(kinds) if other == kind]
        order = np.random.default_rng([demand.seed, *kind]).permutation(len(layers))
        for place, source in zip(layers, order, strict=True):
            given[place] = ranks[layers[source]]
    kept = []
    for values, rank in zip(scores, given, strict=True):
        mask = np.zeros(len(values), bool)
        mask[np.argsort(-np.asarray(values, float), kind="stable")[:rank]] = True
        kept.append(mask)
    return kept
