"""One rank for all layers of a module type: the control for "is it the layer, or only its type?"

A group (all query projections, all output projections, ...) gets one more block for every layer at once, in the order
of the groups' mean score per cost. A remainder too small for a whole group goes to single layers of the next group in
line, first layers first, so that the budget is met as exactly as by every other rule.

Known weakness: differences between the blocks of a network, such as early and late ones, are averaged out.
"""

from __future__ import annotations

import numpy as np

from .base import Blocks, Demand, Kept, Scores, fill


def allocate(scores: Scores, demand: Demand) -> Kept:
    """Keep equal ranks within each of ``demand.groups``, as many as its mean score per cost earns. Without groups,
    every layer is its own group."""
    groups = np.array(demand.groups or range(len(scores)), int)

    def priority(blocks: Blocks) -> np.ndarray:
        lots = _lots(blocks, groups[blocks.layer])
        at_floor = blocks.position < np.array(demand.floors, int)[blocks.layer] // demand.multiple_of
        left = demand.amount - int(blocks.cost[at_floor].sum())
        bought = np.zeros(len(blocks.layer), bool)
        closed: set[int] = set()
        worth = np.zeros(len(blocks.layer))
        for turn, (group, members) in enumerate(lots):
            worth[members] = -turn
            cost = int(blocks.cost[members[~at_floor[members]]].sum())
            if group in closed or cost > left:
                closed.add(group)  # its later blocks may be cheaper, but must not come before this one
                continue
            bought[members] = True
            left -= cost
        # bought lots first, then the others, both in the order of the lots, so no block comes before an earlier one
        return np.where(bought, len(lots) + worth, worth)

    return fill(scores, demand, priority)


def _lots(blocks: Blocks, groups: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(group, block indices) of every group and position, in falling order of their mean score per cost."""
    lots = []
    for group in np.unique(groups):
        lowest = np.inf
        mine = np.flatnonzero(groups == group)
        for position in np.unique(blocks.position[mine]):
            members = mine[blocks.position[mine] == position]
            # when a weak layer reaches its cap, the mean of the later positions must not rise
            lowest = min(lowest, float((blocks.score[members] / blocks.cost[members]).mean()))
            lots.append((lowest, int(position), int(group), members))
    lots.sort(key=lambda lot: (-lot[0], lot[1], lot[2]))
    return [(group, members) for _, _, group, members in lots]
