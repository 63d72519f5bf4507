"""What is kept of the full adapter's F1 against the share of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..common.figures import BLUE, GREY, ORANGE, save

LOOKS = {"data-free": ("o-", BLUE, -0.006), "inputs": ("^:", GREY, 0.0), "calibrated": ("s--", ORANGE, 0.006)}
"""Mark and line, colour, and a shift to the side, so that error bars do not cover each other."""


def draw(rows: Sequence[dict[str, Any]], stem: Path) -> None:
    """Write ``stem``.png and ``stem``.svg."""
    figure = Figure(figsize=(6.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1, color="0.6", linewidth=0.8)
    for kind, (style, colour, shift) in LOOKS.items():
        mine = [r for r in rows if r["kind"] == kind]
        axes.errorbar(
            [r["share"] + shift for r in mine], [r["kept"] for r in mine], yerr=[r["standard_error"] for r in mine],
            fmt=style, color=colour, capsize=2, label={"inputs": "weighed by inputs alone"}.get(kind, kind),
        )  # fmt: skip
    for row in [r for r in rows if "then" in r["kind"]]:
        colour = LOOKS[row["kind"].split(",")[0]][1]
        axes.plot(row["share"] + 0.02, row["kept"], "*", color=colour, markersize=11, label=row["kind"])
    axes.set_xlabel("share of the parameters of a rank 16 LoRA")
    axes.set_ylabel("F1, share of the full adapter's")
    shares = sorted({r["share"] for r in rows if r["kind"] in LOOKS}, reverse=True)
    axes.set_xticks(shares, [str(Fraction(share)) for share in shares])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    save(figure, stem)
