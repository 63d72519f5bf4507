"""Both budgets in one figure: each arm's losses on held-out words, and where `auto` put the ranks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..common import figures
from ..common.paired import Runs
from .analysis import finished
from .arms import ATTACH, DRIVEN, MEAN_RANK
from .parts import Budget

COLORS = {ATTACH: figures.BLUE, DRIVEN: figures.ORANGE}
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def draw(parts: Sequence[tuple[Budget, Runs]], stem: Path) -> None:
    """Write ``stem``.png and ``stem``.svg, or nothing when there is nothing to show."""
    shown = [(part, runs) for part, runs in parts if any(finished(part, runs, arm) for arm in part.arms)]
    if not shown:
        return
    figure = Figure(figsize=(8.6, 2.9 * len(shown)), dpi=150, layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(1, 1.5))
    for (left, right), (part, runs) in zip(axes, shown, strict=True):
        _losses(left, part, runs)
        _ranks(figure, right, part, runs)
    figures.save(figure, stem)


def _losses(ax: Axes, part: Budget, runs: Runs) -> None:
    """Every seed's loss and the mean of each arm."""
    arms = [arm for arm in part.compared(runs) if finished(part, runs, arm)]
    for line, arm in enumerate(arms[::-1]):
        losses = [run["loss"] for run in finished(part, runs, arm)]
        color = COLORS.get(arm, figures.GREY)
        ax.plot(losses, [line] * len(losses), "o", color=color, markersize=4, alpha=0.5, mew=0)
        ax.plot(statistics.fmean(losses), line, "|", color=color, markersize=16, mew=2)
    ax.set_yticks(range(len(arms)), arms[::-1], fontsize=8)
    ax.set_ylim(-0.6, len(arms) - 0.4)
    ax.set_xlabel("loss on held-out words (nats a token)", fontsize=8)
    ax.set_title(f"{MEAN_RANK[part.name]:g} ranks a layer", fontsize=9, loc="left")
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(axis="x", color="#dddddd", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _ranks(figure: Figure, ax: Axes, part: Budget, runs: Runs) -> None:
    """The mean final rank of each layer over the seeds of ``auto`` through ``ra.attach``."""
    own = finished(part, runs, ATTACH)
    if not own:
        ax.set_axis_off()
        return
    blocks = 1 + max(int(name.split(".")[2]) for name in own[0]["ranks"])
    grid = np.zeros((len(ROLES), blocks))
    for run in own:
        for name, rank in run["ranks"].items():
            grid[ROLES.index(name.rsplit(".", 1)[-1]), int(name.split(".")[2])] += rank / len(own)
    image = ax.imshow(grid, cmap="Blues", aspect="auto", vmin=0)
    ax.set_yticks(range(len(ROLES)), ROLES, fontsize=7)
    ax.set_xlabel("block", fontsize=8)
    ax.set_title(f"final ranks of {ATTACH}", fontsize=9, loc="left")
    ax.tick_params(axis="x", labelsize=8)
    bar = figure.colorbar(image, ax=ax, pad=0.01)
    bar.ax.tick_params(labelsize=7)
