"""From a trace to curves: what the training loop logged, a panel a quantity."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..trace import RankTrace

LARGEST = 1e100  # beyond it nothing can be drawn


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis: (name, steps, values) each."""

    title: str
    series: list[tuple[str, list[int], list[float]]]


_NOT_A_CURVE = re.compile(r"(^|[_/])(epoch|runtime|samples_per_second|steps_per_second|total_flos|lr|learning_rate)$")


def curves(trace: RankTrace) -> list[Panel]:
    """The logged values as panels: all losses together, then every other quantity by its own name
    (``eval_f1`` and ``f1`` together). Timings, epochs and the learning rate are left out."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for point in trace.logs:
        for name, value in point.values.items():
            if not _NOT_A_CURVE.search(name) and abs(value) < LARGEST:
                steps, values = series.setdefault(name, ([], []))
                steps.append(point.step)
                values.append(value)
    panels: dict[str, list[tuple[str, list[int], list[float]]]] = {}
    for name, (steps, values) in series.items():
        title = "loss" if "loss" in name else re.sub(r"^(train|eval|tune|test)[_/]", "", name)
        panels.setdefault(title, []).append((name, steps, values))
    ordered = sorted(panels, key=lambda title: title != "loss")
    return [Panel(title, panels[title]) for title in ordered]
