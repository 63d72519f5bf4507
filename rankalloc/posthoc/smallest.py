"""The smallest budget that keeps a metric: bisection over the parameters of a shrunk adapter.

Known weakness: bisection assumes that quality falls with the budget. Where the metric wavers, as it does within its
standard error, the answer is a budget that keeps the metric while the next smaller step does not. A smaller one that
keeps it may exist.

Cost: about log2(steps) evaluations, each budget evaluated once.
"""

from __future__ import annotations

import os
from dataclasses import asdict

from ..budget import RankBudget
from ..errors import BudgetError
from ..options import integer, number
from ..storage.readers import layout_for
from ..storage.reading import FinishedAdapter
from .metric import KroneckerMetric
from .points import Evaluate, Point, Points
from .results import CutResult
from .shrinking import RECORD_NAME, open_adapter
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
    layout: str | None = None,
    pad_multiple: int = 1,
    reader: str | None = None,
    progress: Progress | None = None,
) -> CutResult:
    """Shrink to the smallest budget in parameters whose metric is at most ``max_drop`` (relative) worse.

    Args:
        evaluate: turns an adapter's folder into a finite number, such as a :class:`rankalloc.TaskEvaluator`. Results
            are kept in ``out/points.json`` and not evaluated again.
        max_drop: 0.005 for half a per cent of the whole adapter's metric.
        steps: the budget is found to within one ``steps``-th of the adapter's parameters.
        out, metric, layout, pad_multiple, reader, progress: as in :func:`rankalloc.shrink`.

    Returns:
        Its ``extra["points"]`` has every budget that was evaluated.

    Raises:
        ConfigError: max_drop or steps is out of its range.
        AdapterFileError, RankallocError: as :func:`rankalloc.shrink`.
    """
    max_drop, steps = number("max_drop", max_drop, 0, 1, ends="low"), integer("steps", steps, 2)
    written = layout_for(layout, pad_multiple, reader)
    points = Points(open_adapter(adapter, out), evaluate, out, metric, progress)
    uncut = points.whole()
    worst = uncut.value - abs(uncut.value) * max_drop * (1 if higher_is_better else -1)
    tried: list[Point] = [uncut]

    def budget(step: int) -> RankBudget:
        return RankBudget(params=points.params * step // steps)

    low, high = 0, steps  # the whole adapter keeps its own metric; a budget of 0 is never tried
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
    result = points.write(budget(high), out, written)
    result.extra |= {"max_drop": max_drop, "kept_at_least": worst, "points": [asdict(point) for point in tried]}
    result.save(os.path.join(out, RECORD_NAME))
    return result
