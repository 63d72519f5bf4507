"""The forest plot: per task and budget, every arm's advantage over tuned uniform LoRA with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..common import figures
from .analysis import REFERENCE, Comparison


def forest_plot(comparisons: Sequence[Comparison], stem: Path) -> None:
    """Write ``stem``.png and ``stem``.svg, or nothing when there is nothing to show."""
    shown = [c for c in comparisons if c.against == REFERENCE]
    if not shown:
        return
    tasks, budgets = sorted({c.task for c in shown}), sorted({c.budget for c in shown})
    arms = list(dict.fromkeys(c.arm for c in shown))[::-1]
    figure = Figure(figsize=(1.5 + 3.6 * len(budgets), 1.0 + (0.6 + 0.27 * len(arms)) * len(tasks)), dpi=150)
    axes = figure.subplots(len(tasks), len(budgets), squeeze=False, sharey=True, sharex="row")
    for row, task in enumerate(tasks):
        for column, budget in enumerate(budgets):
            ax, here = axes[row][column], [c for c in shown if (c.task, c.budget) == (task, budget)]
            figures.advantages(
                ax, arms, [(arms.index(c.arm), c.low, c.difference, c.high, "/" in c.arm) for c in here]
            )
            ax.set_ylim(-0.6, len(arms) - 0.4)
            ax.set_title(f"{task}, mean rank {budget}", fontsize=9)
            if here:
                ax.set_xlabel(f"advantage in {here[0].measure} over tuned uniform LoRA", fontsize=8)
    figure.tight_layout()
    figures.save(figure, stem)
