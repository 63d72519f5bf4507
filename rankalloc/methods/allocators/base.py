"""The input of every allocation rule, and the exact filling that rules share. Pure numpy, no torch.

``allocate(scores, demand) -> kept`` knows no model: scores of the triplets of each layer in, a mask for each layer out.
Within a layer, triplets are always kept in the order of their scores, so a rule only decides in which order the layers'
next triplets are bought.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...budget import BudgetPlan
from ...errors import RankallocError

Kept = list[np.ndarray]
Scores = Sequence[np.ndarray]


@dataclass(frozen=True)
class Demand:
    """The constraints of one allocation: the ``amount`` to spend; per layer the cost of a rank, the lowest and the
    highest rank; ranks come in blocks of ``multiple_of``; ``seed`` is for rules that draw, ``groups`` (the module type
    of each layer, as an index) for rules that treat all layers of a type equally."""

    amount: int
    costs: tuple[int, ...]
    floors: tuple[int, ...]
    caps: tuple[int, ...]
    multiple_of: int = 1
    seed: int = 0
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, plan: BudgetPlan, amount: int, seed: int = 0) -> Demand:
        """A demand to spend ``amount`` in the unit and within the bounds of ``plan``."""
        return cls(min(amount, plan.ceiling), plan.costs, plan.floors, plan.caps, plan.multiple_of, seed, plan.groups)

    @classmethod
    def at(cls, plan: BudgetPlan, step: int, seed: int = 0) -> Demand:
        """The demand of ``plan`` after optimizer step ``step``."""
        return cls.of(plan, plan.asked(step), seed)


@dataclass(frozen=True)
class Blocks:
    """All blocks of all layers, one entry each: ``layer`` index, ``position`` in its layer (0 is the best), summed
    ``score``, and ``cost``."""

    layer: np.ndarray
    position: np.ndarray
    score: np.ndarray
    cost: np.ndarray


def fill(scores: Scores, demand: Demand, priority: Callable[[Blocks], np.ndarray]) -> Kept:
    """Buy blocks in falling ``priority`` until no remaining block fits.

    Every layer first gets its floor. A block that no longer fits is skipped, so the unspent remainder is less than the
    cost of the cheapest block still for sale; with equal costs (a budget in ranks) it is zero. Ties are broken by
    position in the layer, then by layer, so equal scores everywhere give equal ranks everywhere.

    Args:
        scores: per layer an array (r,), finite.
        demand: the amount to spend and the bounds of each layer.
        priority: maps the blocks to one number each; must not rise with position inside a layer.

    Returns:
        Per layer a bool array (r,): True for the triplets to keep.

    Raises:
        RankallocError: a score is not finite.
    """
    size = demand.multiple_of
    table = _table(scores, size)
    order = np.argsort(-table, axis=1, kind="stable")
    lengths = np.array([len(values) for values in scores], np.int64)
    counts = np.minimum(np.asarray(demand.caps, np.int64), lengths) // size
    sums = np.take_along_axis(table, order, 1).reshape(len(scores), -1, size)
    # position by position over all layers: a stable sort by priority then breaks ties in the documented order
    position, layer = np.nonzero((np.arange(sums.shape[1]) < counts[:, None]).T)
    cost = np.asarray(demand.costs, np.int64)[layer] * size
    blocks = Blocks(layer, position, sums[layer, position].sum(1), cost)

    bought = position < (np.asarray(demand.floors, np.int64)[layer] // size)
    left = demand.amount - int(cost[bought].sum())
    for_sale = np.flatnonzero(~bought)
    queue = for_sale[np.argsort(-priority(blocks)[for_sale], kind="stable")]
    while len(queue):
        total = np.cumsum(cost[queue])
        fits = int(np.searchsorted(total, left, side="right"))
        bought[queue[:fits]] = True
        left -= int(total[fits - 1]) if fits else 0
        # the first block that does not fit rules out its whole cost class: few distinct costs, few rounds
        queue = queue[fits:]
        queue = queue[cost[queue] <= left]

    ranks = np.bincount(layer[bought], minlength=len(scores)) * size
    kept = np.zeros(table.shape, bool)
    np.put_along_axis(kept, order, np.arange(table.shape[1]) < ranks[:, None], 1)
    return [row[:length] for row, length in zip(kept, lengths, strict=True)]


def _table(scores: Scores, size: int) -> np.ndarray:
    """All scores as one array (layers, highest rank rounded up to whole blocks); -inf where a layer has none."""
    width = -(-max((len(values) for values in scores), default=0) // size) * size
    table = np.full((len(scores), width), -np.inf)
    for row, values in zip(table, scores, strict=True):
        row[: len(values)] = values
    finite = np.isfinite(table).sum(1)
    for index, values in enumerate(scores):
        if finite[index] < len(values):
            raise RankallocError(
                f"the scores of adapted layer {index} are not finite: the adapter's weights have most likely diverged; "
                "lower the learning rate or clip the gradients"
            )
    return table
