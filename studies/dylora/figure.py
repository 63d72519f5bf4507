"""Report loss by rank, one DyLoRA run beside one LoRA run for each rank, with the paired difference below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..common.figures import BLUE, ORANGE, save


def draw(rows: list[dict[str, Any]], stem: Path) -> None:
    """Write ``stem``.png and ``stem``.svg."""
    ranks = [row["rank"] for row in rows]
    figure = Figure(figsize=(6, 5.2), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    joined = "one DyLoRA run (dots: seeds)"
    top.plot(ranks, [row["dylora"]["loss"] for row in rows], "o-", color=BLUE, label=joined)
    top.plot(ranks, [row["lora"]["loss"] for row in rows], "s--", color=ORANGE, label="a LoRA run for each rank")
    for kind, colour in (("dylora", BLUE), ("lora", ORANGE)):
        for row in rows:
            losses = row["losses"][kind]
            top.plot([row["rank"]] * len(losses), losses, ".", color=colour, alpha=0.45, markersize=4)
    top.set_ylabel("loss on the report split (nats)")
    top.legend(frameon=False)
    below.axhline(0, color="0.5", linewidth=0.8)
    below.errorbar(
        ranks, [row["difference"] for row in rows], yerr=[2 * row["standard_error"] for row in rows], fmt="o",
        color=BLUE, capsize=3,
    )  # fmt: skip
    below.set_ylabel("DyLoRA − LoRA\n(± 2 standard errors)")
    below.set_xlabel("rank")
    below.set_xticks(ranks)
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, stem)
