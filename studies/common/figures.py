"""Figures as PNG and SVG: the same drawing gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rankalloc.files import replacing

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#7f7f7f"
CHOSEN, CONTROL = "#1f5fa8", "#8a8a8a"


def save(figure: Figure, stem: Path) -> None:
    """Write ``stem``.png and ``stem``.svg."""
    with matplotlib.rc_context({"svg.hashsalt": "rankalloc", "svg.fonttype": "none"}):
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            with replacing(stem.with_suffix(f".{ending}")) as temporary:
                figure.savefig(temporary, format=ending, metadata=metadata, dpi=150)


def advantages(ax: Axes, names: Sequence[str], marks: Sequence[tuple[int, float, float, float, bool]]) -> None:
    """Draw an advantage and its interval on the line of each arm.

    Args:
        names: of the arms, from the bottom line up.
        marks: (line, low, difference, high, whether the arm is a control). Controls are grey; a hollow mark says that
            the interval covers zero.
    """
    ax.axvline(0, color="#222222", linewidth=0.9)
    for line, low, difference, high, control in marks:
        color = CONTROL if control else CHOSEN
        ax.plot([low, high], [line, line], color=color, linewidth=1.6, solid_capstyle="butt")
        ax.plot(difference, line, "o", color=color, markersize=5, mfc="white" if low <= 0 <= high else color)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(axis="x", color="#dddddd", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
