"""Quality against budget for one adapter: evaluated points, the knee, a figure.

The knee is the point farthest above the straight line between the ends, both axes scaled to 0…1 (Kneedle: Satopää et
al., 2011). Known weaknesses: it moves with the range of budgets that is asked for, and each point is one evaluation, so
that a knee between points that differ by less than the metric's own noise means nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..budget import RankBudget
from ..errors import ConfigError
from ..files import replacing, write_json
from ..storage.reading import FinishedAdapter
from .metric import KroneckerMetric
from .nested_cut import settled_cut, unweighed
from .points import Evaluate, NestedPoints, Point, Points
from .truncation import Progress

FRONTIER_NAME = "frontier.json"


@dataclass
class Frontier:
    """The curve: ``points`` by rising parameters, the whole adapter last; ``knee`` is one of them, or None when no
    point lies above the line between the ends; ``cut`` is how the adapter was cut."""

    points: list[Point]
    knee: Point | None
    higher_is_better: bool
    name: str = "metric"
    cut: str = "svd"

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": 1, "metric": self.name, "higher_is_better": self.higher_is_better, "cut": self.cut,
            "points": [asdict(point) for point in self.points],
            "knee": None if self.knee is None else asdict(self.knee),
        }

    def figure(self):
        """A matplotlib Figure: the metric against parameters, each point with its triplets in all, the knee ringed."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        whole = self.points[-1]
        axes.axhline(whole.value, color="0.6", linewidth=0.8, label="whole adapter")
        axes.plot([p.params for p in self.points], [p.value for p in self.points], "o-", color="#20688f")
        for point in self.points:
            axes.annotate(
                f"{point.ranks:,}", (point.params, point.value), xytext=(0, -17), textcoords="offset points",
                fontsize=7, color="0.35", ha="center",
            )
        if self.knee is not None:
            axes.plot(
                [self.knee.params], [self.knee.value], "o", markersize=13, markerfacecolor="none", color="#b8541a",
                linestyle="none", label=f"knee: {self.knee.params:,} parameters",
            )
        axes.set(xlabel="adapter parameters (below each point: triplets in all layers)", ylabel=self.name)
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        return figure

    def save(self, folder: str | os.PathLike) -> Path:
        """Write frontier.json, frontier.svg and frontier.png. Raises RankallocError when one cannot be written."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        with matplotlib.rc_context({"svg.hashsalt": "rankalloc"}):
            figure = self.figure()
            FigureCanvasAgg(figure)
            for kind in ("svg", "png"):
                with replacing(Path(folder) / f"frontier.{kind}") as temporary:
                    figure.savefig(temporary, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        return write_json(Path(folder) / FRONTIER_NAME, self.to_dict())


def frontier(
    adapter: str | os.PathLike | FinishedAdapter,
    budgets: Sequence[RankBudget] | None,
    evaluate: Evaluate,
    out: str | os.PathLike | None = None,
    *,
    higher_is_better: bool = True,
    name: str = "metric",
    metric: KroneckerMetric | None = None,
    cut: str | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """Evaluate one adapter at several budgets, and whole.

    Args:
        adapter: as in :func:`rankalloc.shrink`; one trained at a high rank, or by method "dylora", shows the most.
        budgets: what to shrink to; with nested cuts, None for every rank there is.
        evaluate: folder of an adapter to a finite number.
        out: folder for the JSON, the figures, and ``points.json``, from which nothing is evaluated twice.
        name: of the metric, in the figure.
        metric: what shrinking weighs layers by.
        cut: "svd" keeps the largest singular triplets; "nested" the first triplets of each layer, at the scale they
            were trained at (:mod:`rankalloc.posthoc.nested_cut`): the most that each budget has room for, and one
            point for budgets that come to the same. None is "nested" for what method "dylora" trained, else "svd".

    Raises:
        ConfigError: no budget is given; the adapter is not nested, or a nested cut is to be weighed.
        BudgetError, AdapterFileError, RankallocError: as :func:`rankalloc.shrink`.
    """
    adapter = adapter if isinstance(adapter, FinishedAdapter) else FinishedAdapter(adapter)
    cut = settled_cut(adapter, cut)
    if budgets is not None and not budgets or budgets is None and cut != "nested":
        raise ConfigError("frontier needs at least one budget")
    unweighed(cut, metric)
    # every mistake is told before anything is evaluated
    asked: list[Callable[[], Point]]
    if cut == "nested":
        points = NestedPoints(adapter, evaluate, out)
        asked = [partial(points.at_rank, rank) for rank in points.ranks(budgets)]
    else:
        points = Points(adapter, evaluate, out, metric, progress)
        for budget in budgets:
            points.choice(budget)
        asked = [partial(points.at, budget) for budget in budgets]
    found = []
    for ask in (points.whole, *asked):  # the adapter itself first: what is wrong with it is then said of its folder
        found.append(ask())
        if progress is not None:
            progress(len(found), len(asked) + 1, {"params": found[-1].params, name: found[-1].value})
    ordered = sorted(found[1:], key=lambda point: point.params) + found[:1]
    curve = Frontier(ordered, knee_of(ordered, higher_is_better), higher_is_better, name, cut)
    if out is not None:
        curve.save(out)
    return curve


def knee_of(points: Sequence[Point], higher_is_better: bool = True) -> Point | None:
    """The point farthest above the line from the first to the last; None when none is above it."""
    sign = 1 if higher_is_better else -1
    first, last = points[0], points[-1]
    width, height = last.params - first.params, sign * (last.value - first.value)
    if width <= 0 or height <= 0:
        return None

    def above(point: Point) -> float:
        return sign * (point.value - first.value) / height - (point.params - first.params) / width

    best = max(points, key=above)
    return best if above(best) > 0 else None
