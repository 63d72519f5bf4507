"""From finished runs to tables: each arm at its own rate, beside the tuned uniform one."""

from __future__ import annotations

import statistics
from typing import Any

from ..common.paired import Runs, difference, edge_note, judged, paired, rate_table
from ..common.table import markdown
from .parts import Budget


def report(part: Budget, runs: Runs) -> str:
    """A part's tables in Markdown."""
    return "\n\n".join([rate_table(part, runs), loss_table(part, runs)])


def finished(part: Budget, runs: Runs, arm: str) -> list[dict[str, Any]]:
    """The judged runs of an arm that did not diverge, by seed."""
    return [run for run in judged(part, runs, part.places[0], arm).values() if "message" not in run]


def advantage(part: Budget, runs: Runs, arm: str) -> tuple[float, float, float, list[float]] | None:
    """(mean, low, high, each) of an arm's loss minus the tuned uniform one's, paired by seed."""
    uniform = part.uniform(runs)
    return None if uniform is None else paired(part, runs, part.places[0], arm, uniform)


def loss_table(part: Budget, runs: Runs) -> str:
    """Each judged arm at its own rate, on the seeds that chose none."""
    header = ("arm", "rate", "seeds", "trained at the peak", "at the end", "loss", "each seed",
              "loss − tuned uniform's (95 %)", "token accuracy", "CPU s")  # fmt: skip
    rows = []
    for arm in part.compared(runs):
        if not (own := finished(part, runs, arm)):
            continue
        rows.append([
            arm, f"{own[0]['rate']:g}{edge_note(part, runs, arm)}", str(len(own)),
            *(f"{max(run[name] for run in own):,}" for name in ("peak_params", "final_params")),
            f"{statistics.fmean(run['loss'] for run in own):.4f}", " ".join(f"{run['loss']:.4f}" for run in own),
            difference(advantage(part, runs, arm)),
            f"{statistics.fmean(run['accuracy'] for run in own):.3f}",
            f"{statistics.median(run['cpu_seconds'] for run in own):.0f}",
        ])  # fmt: skip
    return markdown(header, rows)
