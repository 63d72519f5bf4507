"""From finished runs to the comparison: chosen rates, paired differences of the losses, and the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..common import grid
from ..common.table import markdown

KINDS = ("dylora", "lora")


def arms(rank: int) -> list[tuple[str, int]]:
    """(kind, rank) of every arm: DyLoRA with the top rank, and LoRA of each rank from the top down."""
    return [("dylora", rank), *(("lora", served) for served in range(rank, 0, -1))]


def tuning_loss(run: dict[str, Any]) -> float:
    """Loss on the tune split; for a DyLoRA run the mean over the ranks it serves."""
    return statistics.fmean(e["tune"]["loss"] for e in run["evaluations"].values())


def tune_losses(runs: Sequence[dict], kind: str, rank: int) -> dict[float, float]:
    """{rate: tuning loss} at seed 0."""
    mine = [run for run in runs if (run["kind"], run["rank"], run["seed"]) == (kind, rank, 0)]
    return grid.mean_losses(((run["rate"], tuning_loss(run)) for run in mine), 1)


def judged(runs: Sequence[dict], kind: str, rank: int) -> dict[int, dict]:
    """{seed: run} of an arm at its best rate."""
    rate = grid.best_rate(tune_losses(runs, kind, rank))
    return {run["seed"]: run for run in runs if (run["kind"], run["rank"], run["rate"]) == (kind, rank, rate)}


def complete(runs: Sequence[dict], rank: int) -> list[dict]:
    """The runs of those seeds that every arm was run with at its best rate."""
    seeds = set.intersection(*(set(judged(runs, *arm)) for arm in arms(rank)))
    return [run for run in runs if run["seed"] in seeds]


def compare(runs: Sequence[dict], rank: int) -> list[dict[str, Any]]:
    """Per served rank: report losses and F1 of both kinds, and the paired difference of the losses.

    Its standard error is taken over seeds; that over the windows of one run leaves out the scatter between runs.
    """
    nested, rows = judged(runs, "dylora", rank), []
    for served in range(1, rank + 1):
        own = judged(runs, "lora", served)
        seeds = sorted(nested.keys() & own.keys())
        if not seeds:
            continue
        pairs = [tuple(run[seed]["evaluations"][str(served)] for run in (nested, own)) for seed in seeds]
        differences = [one["report"]["loss"] - two["report"]["loss"] for one, two in pairs]
        mean = float(np.mean(differences))
        error = float(np.std(differences, ddof=1) / math.sqrt(len(seeds))) if len(seeds) > 1 else math.nan
        windows = np.mean([np.subtract(one["report_losses"], two["report_losses"]) for one, two in pairs], axis=0)
        rows.append({
            "rank": served, "seeds": seeds, "rates": tuple(run[seeds[0]]["rate"] for run in (nested, own)),
            "dylora": {m: float(np.mean([one["report"][m] for one, _ in pairs])) for m in ("loss", "f1")},
            "lora": {m: float(np.mean([two["report"][m] for _, two in pairs])) for m in ("loss", "f1")},
            "losses": {kind: [pair[i]["report"]["loss"] for pair in pairs] for i, kind in enumerate(KINDS)},
            "difference": mean, "standard_error": error,
            "window_error": float(windows.std(ddof=1) / math.sqrt(len(windows))),
            "within": bool(mean <= 2 * error) if math.isfinite(error) else mean <= 0,
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison in Markdown."""
    header = ("rank", "DyLoRA loss", "LoRA loss (its rate)", "difference ± standard error over seeds", "over windows",
              "DyLoRA F1", "LoRA F1", "within 2, or better")  # fmt: skip
    return markdown(header, [
        (
            str(row["rank"]), f"{row['dylora']['loss']:.4f}", f"{row['lora']['loss']:.4f} ({row['rates'][1]:g})",
            f"{row['difference']:+.4f} ± {row['standard_error']:.4f}", f"± {row['window_error']:.4f}",
            f"{row['dylora']['f1']:.3f}", f"{row['lora']['f1']:.3f}", "yes" if row["within"] else "no",
        )
        for row in rows
    ])  # fmt: skip
