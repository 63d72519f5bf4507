"""The forest plot: per task and budget, every arm's advantage over tuned uniform LoRA with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from analysis import REFERENCE, Comparison
from matplotlib.figure import Figure

from rankalloc.files import replacing

CHOSEN, CONTROL = "#1f5fa8", "#8a8a8a"


def forest_plot(comparisons: Sequence[Comparison], stem: Path) -> list[Path]:
    """Write ``stem``.png and ``stem``.svg; nothing, and no file, when there is nothing to show.

    Colour is for methods, grey for controls; a hollow mark says that the interval covers zero.
    """
    shown = [c for c in comparisons if c.against == REFERENCE and c.task != "all"]
    cells = sorted({(c.task, c.budget) for c in shown})
    if not cells:
        return []
    tasks, budgets = sorted({task for task, _ in cells}), sorted({budget for _, budget in cells})
    arms = list(dict.fromkeys(c.arm for c in shown))[::-1]
    figure = Figure(figsize=(1.5 + 3.6 * len(budgets), 1.0 + (0.6 + 0.27 * len(arms)) * len(tasks)), dpi=150)
    axes = figure.subplots(len(tasks), len(budgets), squeeze=False, sharey=True, sharex="row")
    for row, task in enumerate(tasks):
        for column, budget in enumerate(budgets):
            ax, here = axes[row][column], [c for c in shown if (c.task, c.budget) == (task, budget)]
            ax.axvline(0, color="#222222", linewidth=0.9)
            for c in here:
                y, color = arms.index(c.arm), CONTROL if "/" in c.arm else CHOSEN
                ax.plot([c.low, c.high], [y, y], color=color, linewidth=1.6, solid_capstyle="butt")
                ax.plot(c.difference, y, "o", color=color, markersize=5, mfc="white" if c.covers_zero else color)
            ax.set_yticks(range(len(arms)), arms, fontsize=8)
            ax.set_ylim(-0.6, len(arms) - 0.4)
            ax.tick_params(axis="x", labelsize=8)
            ax.set_title(f"{task}, mean rank {budget}", fontsize=9)
            ax.grid(axis="x", color="#dddddd", linewidth=0.5)
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
            if here:
                ax.set_xlabel(f"advantage in {here[0].measure} over tuned uniform LoRA", fontsize=8)
    figure.tight_layout()
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "rankalloc", "svg.fonttype": "none"}):
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            path = stem.with_suffix(f".{ending}")
            with replacing(path) as temporary:
                figure.savefig(temporary, format=ending, metadata=metadata)
            written.append(path)
    return written
