"""From finished runs to the comparison: chosen rates, paired advantages, the table and the sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rankalloc.experiments.paired import paired_difference

from ..common import grid
from ..common.table import interval, markdown, p_text
from .arms import REFERENCE


def tune_losses(runs: Sequence[dict], arm: str, seeds: int) -> dict[float, float]:
    """{rate: mean tuning loss} of the rates at which ``seeds`` runs of phase "rates" have finished."""
    mine = [run for run in runs if (run["phase"], run["arm"]) == ("rates", arm)]
    return grid.mean_losses(((r["rate"], r["tune"]["loss"] if "tune" in r else math.inf) for r in mine), seeds)


def judged(runs: Sequence[dict], arm: str, rate_seeds: int) -> dict[int, dict]:
    """{seed: run} of the arm at its chosen rate, on the report split."""
    rate = grid.best_rate(tune_losses(runs, arm, rate_seeds))
    mine = [r for r in runs if (r["phase"], r["arm"], r["rate"]) == ("seeds", arm, rate) and "report" in r]
    return {run["seed"]: run for run in mine}


def compare(runs: Sequence[dict], arms: Sequence[str], rate_seeds: int) -> list[dict[str, Any]]:
    """Per arm: means on the report split, sizes, and the paired advantage over plain LoRA (above zero is better)."""
    reference, rows = judged(runs, REFERENCE, rate_seeds), []
    for arm in arms:
        own, losses = judged(runs, arm, rate_seeds), tune_losses(runs, arm, rate_seeds)
        if not own:
            continue
        any_run = next(iter(own.values()))
        row = {
            "arm": arm, "rate": any_run["rate"], "rates": sorted(losses), "seeds": len(own),
            "edge": any_run["rate"] in (min(losses), max(losses)),
            **{key: max(run[key] for run in own.values()) for key in ("trained_peak", "trained_final", "file_params")},
            **{name: statistics.fmean(run["report"][name] for run in own.values()) for name in ("loss", "f1")},
        }  # fmt: skip
        pairs = sorted(own.keys() & reference.keys())
        for name, sign in (("f1", 1.0), ("loss", -1.0)):
            if arm != REFERENCE and len(pairs) > 1:
                values = [[sign * side[seed]["report"][name] for seed in pairs] for side in (own, reference)]
                row[f"{name} advantage"] = {**paired_difference(*values), "seeds": len(pairs)}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison in Markdown."""
    header = ("arm", "rate (tried)", "trained at the peak", "at the end", "in the file", "F1", "loss",
              "F1 against LoRA (95 % interval)", "loss against LoRA (95 % interval)")  # fmt: skip
    lines = []
    for row in rows:
        tried = ", ".join(f"{rate:g}" for rate in row["rates"])
        lines.append([
            row["arm"], f"{row['rate']:g}{' at an edge' if row['edge'] else ''} ({tried})",
            *(f"{row[key]:,}" for key in ("trained_peak", "trained_final", "file_params")),
            *(f"{row[name]:.4f}" for name in ("f1", "loss")),
            *(_with_interval(row.get(f"{name} advantage")) for name in ("f1", "loss")),
        ])  # fmt: skip
    return markdown(header, lines)


def _with_interval(advantage: dict[str, float] | None) -> str:
    if advantage is None:
        return "–"
    return f"{advantage['difference']:+.4f} ({interval(advantage['low'], advantage['high'])})"


def sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One plain sentence for each arm."""
    found = []
    for row in rows:
        advantage = row.get("f1 advantage")
        if advantage is None:
            continue
        span = f"95 % interval {interval(advantage['low'], advantage['high'])}"
        if advantage["low"] <= 0 <= advantage["high"]:
            said = f"no difference to plain LoRA in F1 was shown, the interval covers zero ({span})"
        else:
            word = "above" if advantage["difference"] > 0 else "below"
            said = (
                f"{abs(advantage['difference']):.4f} {word} plain LoRA in F1 ({span}, p {p_text(advantage['p_value'])})"
            )
        found.append(f"{row['arm']}, {advantage['seeds']} paired seeds: {said}.")
    return found
