"""The three parts in one figure: errors beside ``ra.attach``, losses by rate, and paired differences on real text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from ..common import figures
from ..common.paired import Runs, judged
from ..common.part import Part
from .analysis import ONE_RATE, at, paired
from .arms import ATTACH, ATTACH_LORA, DRIVEN, EQUAL, PEAK

STYLES = {
    ATTACH: (figures.BLUE, "o", "-"), ATTACH_LORA: ("#56b4e9", "s", "--"), DRIVEN: (figures.ORANGE, "D", "-"),
    EQUAL: (figures.GREY, "^", ":"), PEAK: ("#222222", "v", ":"),
}  # fmt: skip
"""Colour, mark and line of each arm, apart in black and white too."""
BOUND = 1.2
"""The factor within which an error counts as level; drawn as a band."""


def draw(parts: Sequence[tuple[Part, Runs]], stem: Path) -> None:
    """Write ``stem``.png and ``stem``.svg, or nothing when there is nothing to show."""
    panels = {"planted": _errors, "language": _losses, "punctuation": _differences}
    shown = [(part, runs) for part, runs in parts if any(judged(part, runs, part.places[0], arm) for arm in part.arms)]
    if not shown:
        return
    figure = Figure(figsize=(3.9 * len(shown), 3.3), dpi=150)
    for letter, ax, (part, runs) in zip("abc", figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=False):
        panels[part.name](ax, part, runs)
        ax.set_title(f"({letter}) {part.name}", fontsize=9, loc="left")
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figures.save(figure, stem)


def _errors(ax: Axes, part: Part, runs: Runs) -> None:
    """Each seed's error beside that of ``ra.attach`` at one rate for all arms, the geometric means, and the band that
    counts as level."""
    part = at(ONE_RATE, part)
    ax.axhspan(1 / BOUND, BOUND, color="#eeeeee", zorder=0)
    ax.axhline(1, color="#222222", linewidth=0.9)
    for column, place in enumerate(part.places):
        for arm, shift in ((ATTACH_LORA, -0.15), (DRIVEN, 0.15)):
            if (ratio := paired(part, runs, place, arm)) is None:
                continue
            color, mark, _ = STYLES[arm]
            seeds = [10**value for value in ratio[3]]
            ax.plot([column + shift] * len(seeds), seeds, mark, color=color, markersize=3.5, alpha=0.45, mew=0)
            ax.plot(column + shift, 10 ** ratio[0], mark, color=color, markersize=7, label=arm if column == 0 else None)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(FixedLocator([0.25, 0.5, 0.8, 1, 1.2, 1.5, 2, 4]))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xticks(range(len(part.places)), [place.replace(" ", "\n") for place in part.places])
    ax.set_ylabel(f"error ÷ attach's, all at rate {ONE_RATE:g}", fontsize=8)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7, frameon=False)


def _losses(ax: Axes, part: Part, runs: Runs) -> None:
    """The mean loss of every arm at every rate it was tried at."""
    for arm in part.arms:
        color, mark, stroke = STYLES[arm]
        tuned = {rate: loss for rate, loss in part.tuned(runs, arm).items() if math.isfinite(loss)}
        ax.plot(list(tuned), list(tuned.values()), marker=mark, linestyle=stroke, color=color, markersize=4, label=arm)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("learning rate", fontsize=8)
    ax.set_ylabel("loss (nats)", fontsize=8)
    ax.legend(fontsize=7, frameon=False)


def _differences(ax: Axes, part: Part, runs: Runs) -> None:
    """The mean advantage in loss over ``ra.attach`` with its t interval, and each seed's."""
    found = {arm: pair for arm in part.arms[::-1] if (pair := paired(part, runs, part.places[0], arm)) is not None}
    marks = [(line, -high, -mean, -low, arm == EQUAL) for line, (arm, (mean, low, high, _)) in enumerate(found.items())]
    figures.advantages(ax, list(found), marks)
    for line, (_, _, _, seeds) in enumerate(found.values()):
        ax.plot([-value for value in seeds], [line - 0.18] * len(seeds), "|", color="#555555", markersize=6)
    ax.locator_params(axis="x", nbins=4)
    ax.set_ylim(-0.6, len(found) - 0.4)
    ax.set_xlabel("advantage in loss over attach (nats)", fontsize=8)
