"""The smallest budget that keeps a metric: bisection over a shrunk adapter's parameters, each point evaluated once.

Bisection takes quality to fall with the budget. Where it wavers (it does, within its standard error) the answer is a
budget that keeps the metric next to one, a step smaller, that does not; not the smallest of all such.

Cost: about log2(steps) evaluations.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from ..budget import RankBudget
from ..errors import BudgetError
from ..options import integer, number
from ..storage.folder import check_layout
from ..storage.reading import FinishedAdapter
from .metric import KroneckerMetric
from .points import Evaluate, Point, Points
from .results import CutResult
from .shrinking import RECORD_NAME, settled
from .truncation import Progress


def smallest(
    adapter: str | os.PathLike | FinishedAdapter,
    evaluate: Evaluate,
    max_drop: float,
    out: str | os.PathLike,
    *,
    higher_is_better: bool = True,
    steps: int = 64,
    metric: KroneckerMetric | None = None,
    layout: str = "compact",
    pad_multiple: int = 1,
    progress: Progress | None = None,
) -> CutResult:
    """Shrink to the smallest budget in parameters whose metric is at most ``max_drop`` (relative) worse.

    Args:
        evaluate: folder of an adapter to a finite number, such as a :class:`rankalloc.TaskEvaluator`. What it
            was is kept in ``out/points.json`` and not evaluated again.
        max_drop: 0.005 for half a per cent of the whole adapter's metric.
        steps: the budget is found to this fraction of the adapter's parameters.
        out, metric, layout, pad_multiple, progress: as in :func:`rankalloc.shrink`.

    Returns:
        ``extra["points"]`` has every budget that was evaluated.

    Raises:
        ConfigError: max_drop or steps is out of its range.
        AdapterFileError, RankallocError: as :func:`rankalloc.shrink`.
    """
    max_drop, steps = number("max_drop", max_drop, 0, 1, ends="low"), integer("steps", steps, 2)
    check_layout(layout, pad_multiple)
    finished = settled(adapter, out)
    points = Points(finished, evaluate, out, metric, progress)
    whole = points.whole()
    worst = whole.value - abs(whole.value) * max_drop * (1 if higher_is_better else -1)
    tried: list[Point] = [whole]

    def budget(step: int) -> RankBudget:
        return RankBudget(params=points.params * step // steps)

    low, high = 0, steps  # the whole adapter keeps its own metric; a budget of nothing is not asked for
    while high - low > 1:
        middle = (low + high) // 2
        try:
            point = points.at(budget(middle))
        except BudgetError:  # too small to buy a rank
            low = middle
            continue
        tried.append(point)
        keeps = point.value >= worst if higher_is_better else point.value <= worst
        low, high = (low, middle) if keeps else (middle, high)
    result = points.write(budget(high), out, layout=layout, pad_multiple=pad_multiple)
    result.extra |= _told(tried, max_drop, worst)
    result.save(os.path.join(out, RECORD_NAME))
    return result


def _told(tried: list[Point], max_drop: float, worst: float) -> dict[str, Any]:
    return {"max_drop": max_drop, "kept_at_least": worst, "points": [asdict(point) for point in tried]}
