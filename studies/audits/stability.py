"""How alike the ranks are that a method chooses, from seed to seed and from task to task, beside ranks by chance."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

import rankalloc as ra

from ..common.table import markdown

ARMS = ("auto", "random")


def stability(records: Sequence[ra.AuditRecord]) -> dict[str, Any]:
    """{"seeds": rows of one audit's arm each, "tasks": rows of two audits of one size each}."""
    seeds = [
        {"audit": record.name, "arm": name, **_alike(list(itertools.combinations(_ranks(record, name), 2)))}
        for record in records for name in ARMS
    ]
    tasks = [
        {"audits": [first.name, second.name], "arm": name,
         **_alike(list(itertools.product(_ranks(first, name), _ranks(second, name))))}
        for first, second in itertools.combinations(records, 2)
        if first.params == second.params and first.task != second.task for name in ARMS
    ]  # fmt: skip
    return {"seeds": seeds, "tasks": tasks}


def _ranks(record: ra.AuditRecord, name: str) -> list[np.ndarray]:
    return [np.asarray(run.ranks) for run in record.arm(name).runs if run.ranks is not None]


def _alike(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float | int]:
    """Mean Spearman correlation of the layers' ranks and mean Jaccard overlap of the rank units."""
    related = [float(stats.spearmanr(a, b).statistic) for a, b in pairs]
    overlap = [float(np.minimum(a, b).sum() / np.maximum(a, b).sum()) for a, b in pairs]
    return {"pairs": len(pairs), "spearman": statistics.fmean(related), "jaccard": statistics.fmean(overlap)}


def table(found: dict[str, Any]) -> str:
    """Both parts in Markdown."""
    rows = [
        [" and ".join(row.get("audits", [row.get("audit", "")])), row["arm"], str(row["pairs"]),
         f"{row['spearman']:.2f}", f"{row['jaccard']:.2f}"]
        for row in (*found["seeds"], *found["tasks"])
    ]  # fmt: skip
    return markdown(("audit", "ranks", "pairs of runs", "Spearman of the layers' ranks", "Jaccard of rank units"), rows)
