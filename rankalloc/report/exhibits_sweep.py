"""The figures of a sweep with their captions and numbers."""

from __future__ import annotations

from ..trace import SweepRecord
from . import figures_sweep, sweeps
from .exhibit import Exhibit
from .wording import count, fixed, number


def sweep(record: SweepRecord, rows: list[sweeps.TrialRow]) -> list[Exhibit]:
    return [*_front(record, rows), *_importances(record), *_slices(record)]


def _front(record: SweepRecord, rows: list[sweeps.TrialRow]) -> list[Exhibit]:
    points = sweeps.front_points(rows)
    if not points:
        return []
    better = "lower" if record.direction == "minimize" else "higher"
    shapes = "Circles are adaptive, squares uniform"
    if any(p.choice == "control" for p in points):
        shapes += ", triangles other controls"
    if any(p.choice == "given" for p in points):
        shapes += ", diamonds given ranks"
    return [
        Exhibit(
            "front",
            "Size against quality",
            lambda: figures_sweep.front_figure(points, record.metric),
            f"Each completed trial by its adapter parameters and its {record.metric} ({better} is better). {shapes}; "
            "the line joins the trials that no other beats on both.",
            ["trial", "ranks", "adapter parameters", record.metric, "on the front", "best"],
            [
                [
                    str(p.number), p.choice, count(p.size), number(p.value), "yes" if p.front else "",
                    "yes" if p.best else "",
                ]
                for p in points
            ],
            names=2,
        )
    ]


def _importances(record: SweepRecord) -> list[Exhibit]:
    weights = sweeps.importances(record)
    if not weights:
        return []
    return [
        Exhibit(
            "importances",
            "What mattered",
            lambda: figures_sweep.importances_figure(weights),
            f"Importance of each parameter for {record.metric}, as the sweep computed it. With few trials these are "
            "rough.",
            ["parameter", "importance"],
            [[n, fixed(v, 3)] for n, v in weights],
        )
    ]


def _slices(record: SweepRecord) -> list[Exhibit]:
    cuts = sweeps.slices(record)
    if not cuts:
        return []
    return [
        Exhibit(
            "slices",
            "One parameter at a time",
            lambda: figures_sweep.slices_figure(cuts, record.metric),
            f"The {record.metric} of each completed trial against each parameter in turn; the others vary too.",
            ["parameter", "its value", record.metric, "trial"],
            [
                [c.name, number(p.x, 6) if c.numeric else str(p.x), number(p.value), str(p.number)]
                for c in cuts
                for p in c.points
            ],
        )
    ]
