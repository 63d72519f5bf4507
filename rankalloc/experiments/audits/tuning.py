"""Which learning rates an arm is tuned at: three at first, then one after another where the best one may lie.

While the best rate is the lowest or the highest tried, the next one lies beyond it. Once it is inside, the gap on the
side of its better neighbour is halved (on a log scale). Every arm gets the same number of runs, wherever it begins.

Cost: as many runs as ``audit.trials``. Weakness: one seed, and the rate alone; batch size and alpha stay as given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...audit_record import TriedRate

_FIRST = 3


def next_rates(tried: Sequence[TriedRate], center: float, spread: float, trials: int, maximize: bool) -> list[float]:
    """The rates to try next, of which none waits for another; none when ``trials`` have been tried.

    Args:
        tried: in the order in which they were tried.
        center, spread: the first rates are center / spread, center and center · spread.
        maximize: whether a higher value is better.
    """
    if len(tried) < _FIRST:
        return [center * spread**power for power in (0, -1, 1)][len(tried):]
    if len(tried) >= trials:
        return []
    ordered = sorted(tried, key=lambda one: one.rate)
    place = ordered.index(best_of(tried, maximize))
    if place in (0, len(ordered) - 1):
        return [ordered[place].rate * (1 / spread if place == 0 else spread)]
    neighbour = best_of([ordered[place - 1], ordered[place + 1]], maximize)
    return [math.sqrt(ordered[place].rate * neighbour.rate)]


def best_of(tried: Sequence[TriedRate], maximize: bool) -> TriedRate:
    """The best rate, of equally good ones the lowest; one at which training failed is the worst."""
    def order(one: TriedRate) -> tuple[float, float]:
        value = -math.inf if one.value is None else one.value if maximize else -one.value
        return -value, one.rate

    return min(tried, key=order)


def at_edge(tried: Sequence[TriedRate], maximize: bool) -> bool:
    """Whether the best rate is the lowest or the highest tried, so that a better one may lie beyond."""
    rates = [one.rate for one in tried]
    return best_of(tried, maximize).rate in (min(rates), max(rates))
