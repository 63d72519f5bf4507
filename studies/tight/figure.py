"""The figure: what auto gains over every other arm, by task and size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..common.figures import advantages, save
from .analysis import Row
from .arms import AS_AUTO, AUTO, HAND, SIZES, TASKS

NAMES = {"punctuation": "punctuation", "pos": "part of speech"}


def draw(rows: Sequence[Row], stem: Path) -> None:
    """Write ``stem``.png and .svg; nothing without rows."""
    sizes = [size for size in SIZES if any(row.size == size for row in rows)]
    tasks = [task for task in TASKS if any(row.task == task for row in rows)]
    if not sizes:
        return
    figure = Figure(figsize=(3.4 * len(sizes) + 1.4, 2.6 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), len(sizes), squeeze=False)
    for line, task in enumerate(tasks):
        for column, size in enumerate(sizes):
            own = [row for row in rows if (row.task, row.size) == (task, size) and row.arm != AUTO]
            own.sort(key=lambda row: -row.difference)
            ax = axes[line, column]
            advantages(ax, [_short(row.arm) for row in own], [
                (place, row.low, row.difference, row.high, row.arm in AS_AUTO) for place, row in enumerate(own)
            ])  # fmt: skip
            ax.set_title(f"{NAMES[task]}, {size} rank a layer", fontsize=9)
            if line == len(tasks) - 1:
                ax.set_xlabel("auto is better by (nats a word)", fontsize=8)
    save(figure, stem)


def _short(arm: str) -> str:
    return f"by hand: {arm}" if arm in HAND else arm
