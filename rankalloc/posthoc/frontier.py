"""Quality against budget for one adapter: evaluated points, the knee, a figure.

AURAC is the area under quality over the logarithm of the size, divided by the length of that axis: the mean quality
over budgets that grow by factors (MatryoshkaLoRA, arXiv 2605.07850, takes log₂ of a rank that all layers share; here it
is log₂ of the parameters). It compares curves over the same budgets and no others.

The knee is the point farthest above the straight line between the ends, both axes scaled to 0…1 (Kneedle: Satopää et
al., 2011). Known weaknesses: it depends on the range of budgets, and each point is a single evaluation, so a knee among
points that differ by less than the metric's noise means nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..budget import RankBudget
from ..errors import ConfigError
from ..files import replacing, write_json
from ..storage.reading import FinishedAdapter
from .metric import KroneckerMetric
from .nested_cut import cut_of, require_no_metric
from .points import Evaluate, NestedPoints, Point, Points
from .shrinking import open_adapter
from .truncation import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRONTIER_NAME = "frontier.json"


@dataclass
class Frontier:
    """The curve of quality against budget.

    Attributes:
        points: by rising parameters, the whole adapter last.
        knee: one of the points; None when no point is above the line between the ends.
        name: of the metric.
        cut: how the adapter was cut, "svd" or "nested".
        recovered: optimizer steps that each point but the whole adapter was trained on after its cut.
    """

    points: list[Point]
    knee: Point | None
    higher_is_better: bool
    name: str = "metric"
    cut: str = "svd"
    recovered: int = 0

    @property
    def aurac(self) -> float | None:
        """The mean quality over log₂ of the parameters, by trapezoids; None for fewer than two sizes."""
        places = {math.log2(point.params): point.value for point in self.points if point.params}
        ordered = sorted(places.items())
        if len(ordered) < 2:
            return None
        area = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(ordered))
        return area / (ordered[-1][0] - ordered[0][0])

    def to_dict(self) -> dict[str, Any]:
        """The curve as plain values for JSON."""
        return {
            "version": 1, "metric": self.name, "higher_is_better": self.higher_is_better, "cut": self.cut,
            "recovered": self.recovered, "aurac": self.aurac,
            "points": [asdict(point) for point in self.points],
            "knee": None if self.knee is None else asdict(self.knee),
        }

    def figure(self) -> Figure:
        """A matplotlib figure of the metric against parameters, with the triplets of each point and the knee ringed."""
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
        if self.aurac is not None:
            further = f"; {self.recovered:,} further steps after each cut" if self.recovered else ""
            axes.set_title(f"AURAC {self.aurac:.4g}{further}", loc="left", fontsize=9)
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
    recovered: int = 0,
    progress: Progress | None = None,
) -> Frontier:
    """Evaluate one adapter at several budgets, and uncut.

    Args:
        adapter: as in :func:`rankalloc.shrink`; one trained at a high rank, or by a method that nests ("dylora",
            "matryoshka"), shows the most.
        budgets: to shrink to; with nested cuts, None for every rank.
        evaluate: turns an adapter's folder into a finite number.
        out: folder for the JSON, the figures, and ``points.json``, which keeps any point from being evaluated twice.
        name: of the metric, in the figure.
        metric: weighs the layers when shrinking.
        cut: "svd" keeps the largest singular triplets; "nested" keeps the first triplets of each layer, as many as the
            budget has room for, at the scale they were trained at (:mod:`rankalloc.posthoc.nested_cut`); budgets with
            the same rank share a point. None is "nested" for what such a method trained, else "svd".
        recovered: optimizer steps that ``evaluate`` trains a cut adapter on before it judges it; for the record.

    Raises:
        ConfigError: no budget is given, a nested cut is asked of an adapter that is not nested, or it is given a
            metric.
        BudgetError, AdapterFileError, RankallocError: as :func:`rankalloc.shrink`.
    """
    adapter = open_adapter(adapter)
    cut = cut_of(adapter, cut)
    if not budgets and (budgets is not None or cut != "nested"):
        raise ConfigError("frontier needs at least one budget")
    require_no_metric(cut, metric)
    # every mistake is reported before anything is evaluated
    evaluations: list[Callable[[], Point]]
    if cut == "nested":
        nested = NestedPoints(adapter, evaluate, out)
        evaluations = [nested.whole, *(partial(nested.at_rank, rank) for rank in nested.ranks(budgets))]
    else:
        points = Points(adapter, evaluate, out, metric, progress)
        for budget in budgets or ():
            points.choice(budget)
        evaluations = [points.whole, *(partial(points.at, budget) for budget in budgets or ())]
    found: list[Point] = []
    for evaluation in evaluations:  # the whole adapter first, so that its own faults are reported with its folder
        found.append(evaluation())
        if progress is not None:
            progress(len(found), len(evaluations), {"params": found[-1].params, name: found[-1].value})
    ordered = sorted(found[1:], key=lambda point: point.params) + found[:1]
    curve = Frontier(ordered, knee_of(ordered, higher_is_better), higher_is_better, name, cut, recovered)
    if out is not None:
        curve.save(out)
    return curve


def knee_of(points: Sequence[Point], higher_is_better: bool = True) -> Point | None:
    """The point farthest above the line from the first to the last point; None when none is above it."""
    sign = 1 if higher_is_better else -1
    first, last = points[0], points[-1]
    width, height = last.params - first.params, sign * (last.value - first.value)
    if width <= 0 or height <= 0:
        return None

    def above(point: Point) -> float:
        return sign * (point.value - first.value) / height - (point.params - first.params) / width

    best = max(points, key=above)
    return best if above(best) > 0 else None
