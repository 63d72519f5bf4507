"""The figures of a sweep with their captions and numbers."""

from __future__ import annotations

from rankalloc.trace import SweepRecord

from . import figures_sweep, sweeps
from .exhibits import Exhibit, exhibit
from .wording import count, fixed, number


def sweep(record: SweepRecord, rows: list[sweeps.TrialRow]) -> list[Exhibit]:
    made = []
    points = sweeps.front_points(rows)
    if points:
        listed = [
            [
                str(r.number),
                "uniform" if r.uniform else "adaptive",
                count(r.adapter_params),
                number(r.value),
                "yes" if r.front else "",
                "yes" if r.best else "",
            ]
            for r in points
        ]
        better = "lower" if record.direction == "minimize" else "higher"
        made.append(
            exhibit(
                "front",
                "Size against quality",
                lambda p, t: figures_sweep.front_figure(points, record.metric, p, t),
                f"Each completed trial by its adapter parameters and its {record.metric} ({better} is better). "
                "Circles are "
                "adaptive, squares uniform; the line joins the trials that no other beats on both.",
                ["trial", "ranks", "adapter parameters", record.metric, "on the front", "best"],
                listed,
                "",
                2,
            )
        )
    weights = sweeps.importances(record)
    if weights:
        made.append(
            exhibit(
                "importances",
                "What mattered",
                lambda p, t: figures_sweep.importances_figure(weights, p, t),
                f"Importance of each parameter for {record.metric}, as the sweep computed it. With few trials these "
                "are "
                "rough.",
                ["parameter", "importance"],
                [[n, fixed(v, 3)] for n, v in weights],
            )
        )
    cuts = sweeps.slices(record)
    if cuts:
        listed = [
            [c.name, number(p.x) if c.numeric else str(p.x), number(p.value), str(p.number)]
            for c in cuts
            for p in c.points
        ]
        made.append(
            exhibit(
                "slices",
                "One parameter at a time",
                lambda p, t: figures_sweep.slices_figure(cuts, record.metric, p, t),
                f"The {record.metric} of each completed trial against each parameter in turn; the others vary too.",
                ["parameter", "its value", record.metric, "trial"],
                listed,
            )
        )
    return made
