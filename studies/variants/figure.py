"""Each arm's advantage over plain LoRA in F1 and in loss, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..common import figures

LABELS = {"f1": "advantage over plain LoRA in F1", "loss": "advantage in loss (nats)"}


def draw(rows: Sequence[dict[str, Any]], stem: Path) -> None:
    """Write ``stem``.png and ``stem``.svg, or nothing when there is nothing to show."""
    shown = [row for row in rows if "f1 advantage" in row][::-1]
    if not shown:
        return
    figure = Figure(figsize=(8.2, 1.2 + 0.36 * len(shown)), dpi=150)
    for ax, (name, label) in zip(figure.subplots(1, 2, sharey=True), LABELS.items(), strict=True):
        found = [row[f"{name} advantage"] for row in shown]
        figures.advantages(ax, [row["arm"] for row in shown], [
            (line, one["low"], one["difference"], one["high"], "uniform" in row["arm"])
            for line, (row, one) in enumerate(zip(shown, found, strict=True))
        ])  # fmt: skip
        ax.locator_params(axis="x", nbins=5)
        ax.set_xlabel(label, fontsize=8)
    figure.tight_layout()
    figures.save(figure, stem)
