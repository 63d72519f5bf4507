"""The figure: how far each line is from LoRA tuned at every budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..common.figures import save
from .analysis import MARGIN, Row
from .arms import RANKS, TASKS, UNIFORM

NAMES = {"punctuation": "Punctuation (F1)", "pos": "Part of speech (accuracy)"}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#222222")
_WIDTH = 0.08
_LOWEST, _HIGHEST = -4.5, 2.0
"""Points that the axis reaches; a mark below is a triangle at its end, whose numbers are in the findings."""


def draw(rows: Sequence[Row], stem: Path) -> None:
    """Write ``stem``.png and .svg; nothing without rows."""
    tasks = [task for task in TASKS if any(row.task == task for row in rows)]
    names = [name for name in dict.fromkeys(row.line for row in rows) if name != UNIFORM]
    if not tasks or not names:
        return
    figure = Figure(figsize=(max(6.6, 4.2 * len(tasks)), 3.9), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for ax, task in zip(axes, tasks, strict=True):
        ax.axhspan(-100 * MARGIN, 100 * MARGIN, color="#eeeeee")
        ax.axhline(0, color="#222222", linewidth=0.9)
        for place, name in enumerate(names):
            own = [row for row in rows if (row.task, row.line) == (task, name)]
            x = [RANKS.index(row.rank) + (place - (len(names) - 1) / 2) * _WIDTH for row in own]
            values = [100 * row.difference for row in own]
            below, above = ([100 * abs(end - row.difference) for row, end in zip(own, side, strict=True)]
                            for side in ([row.low for row in own], [row.high for row in own]))
            colour = _COLOURS[place % len(_COLOURS)]
            ax.errorbar(x, values, [below, above], fmt="o-", color=colour, markersize=4, linewidth=1, label=name)
            outside = [at for at, value in zip(x, values, strict=True) if value < _LOWEST]
            ax.plot(outside, [_LOWEST + 0.12] * len(outside), "v", color=colour, markersize=5)
        ax.set_xticks(range(len(RANKS)), [str(rank) for rank in RANKS], fontsize=8)
        ax.set_xlabel("budget, in ranks a layer", fontsize=9)
        ax.set_title(NAMES[task], fontsize=10)
        ax.set_ylim(_LOWEST, _HIGHEST)
        ax.tick_params(axis="y", labelsize=8)
        ax.grid(axis="y", color="#dddddd", linewidth=0.5)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("points beside uniform LoRA tuned there", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    save(figure, stem)
