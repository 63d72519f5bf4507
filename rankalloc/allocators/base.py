"""What every allocation rule is given, and the exact filling they share. Pure numpy, no torch.

``allocate(scores, demand) -> kept`` knows no model: scores of the triplets of each layer in, a
mask for each layer out. Within a layer, triplets always go in the order of their scores, so a
rule only decides in which order the layers' next triplets are bought.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..budget import BudgetPlan
from ..errors import RankallocError

Kept = list[np.ndarray]
Scores = Sequence[np.ndarray]


@dataclass(frozen=True)
class Demand:
    """What one allocation has to meet: ``amount`` to spend; per layer the cost of a rank, the
    lowest and the highest rank; ranks come in blocks of ``multiple_of``; ``seed`` is for rules that draw,
    ``groups`` (the module type of each layer, as an index) for those that treat layers alike by type."""

    amount: int
    costs: tuple[int, ...]
    floors: tuple[int, ...]
    caps: tuple[int, ...]
    multiple_of: int = 1
    seed: int = 0
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, plan: BudgetPlan, amount: int, seed: int = 0) -> Demand:
        """To spend ``amount`` in the unit, and within the bounds, of ``plan``."""
        return cls(min(amount, plan.ceiling), plan.costs, plan.floors, plan.caps, plan.multiple_of, seed, plan.groups)

    @classmethod
    def at(cls, plan: BudgetPlan, step: int, seed: int = 0) -> Demand:
        """The demand of ``plan`` after optimizer step ``step``."""
        return cls.of(plan, plan.asked(step), seed)


@dataclass(frozen=True)
class Blocks:
    """All blocks of all layers, one entry each: ``layer`` index, ``position`` in its layer (0 is
    the best), summed ``score``, and ``cost``."""

    layer: np.ndarray
    position: np.ndarray
    score: np.ndarray
    cost: np.ndarray


def fill(scores: Scores, demand: Demand, priority: Callable[[Blocks], np.ndarray]) -> Kept:
    """Buy blocks in falling ``priority`` until nothing that is left fits.

    Every layer first gets its floor. A block that no longer fits is passed over, so what stays
    unspent is less than the cheapest block still for sale; with equal costs (a budget in ranks)
    it is zero. Equal priorities go by position in the layer, then by layer: equal scores
    everywhere give equal ranks everywhere.

    Args:
        scores: per layer an array (r,), finite.
        demand: what to spend and the bounds of each layer.
        priority: maps the blocks to one number each; must not rise with position inside a layer.

    Returns:
        Per layer a bool array (r,): True for the triplets to keep.

    Raises:
        RankallocError: a score is not finite.
    """
    orders = [_falling(values, index) for index, values in enumerate(scores)]
    size = demand.multiple_of
    counts = [min(cap, len(order)) // size for cap, order in zip(demand.caps, orders, strict=True)]
    layer = np.repeat(np.arange(len(orders)), counts)
    position = np.concatenate([np.arange(count) for count in counts]) if counts else np.zeros(0, int)
    sums = [
        np.asarray(values, np.float64)[order[: count * size]].reshape(count, size).sum(1)
        for values, order, count in zip(scores, orders, counts, strict=True)
    ]
    cost = np.asarray(demand.costs, np.int64)[layer] * size
    blocks = Blocks(layer, position, np.concatenate(sums) if sums else np.zeros(0), cost)

    bought = position < (np.asarray(demand.floors, np.int64)[layer] // size)
    left = demand.amount - int(cost[bought].sum())
    for_sale = np.flatnonzero(~bought)
    rank_of = np.lexsort((layer[for_sale], position[for_sale], -priority(blocks)[for_sale]))
    queue = for_sale[rank_of]
    while len(queue):
        total = np.cumsum(cost[queue])
        fits = int(np.searchsorted(total, left, side="right"))
        bought[queue[:fits]] = True
        left -= int(total[fits - 1]) if fits else 0
        # the first block that does not fit rules out its whole cost class: few distinct costs, few rounds
        queue = queue[fits:]
        queue = queue[cost[queue] <= left]

    kept = []
    for index, order in enumerate(orders):
        mask = np.zeros(len(order), bool)
        mask[order[: int(bought[layer == index].sum()) * size]] = True
        kept.append(mask)
    return kept


def _falling(values: np.ndarray, index: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise RankallocError(
            f"the scores of adapted layer {index} are not finite: the adapter's weights have most likely diverged; "
            "lower the learning rate or clip the gradients"
        )
    return np.argsort(-values, kind="stable")
