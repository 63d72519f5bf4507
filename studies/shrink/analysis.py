"""From what was measured to the table: F1 as a share of the full adapter's, with its standard error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rankalloc.errors import RankallocError

from ..common.table import markdown
from .measuring import FURTHER_SHARE, KINDS, TRAINED_FURTHER


def f1(counts: np.ndarray) -> np.ndarray:
    """F1 of counts (..., windows, 3)."""
    hits, predicted, real = np.moveaxis(counts.sum(-2), -1, 0)
    return 2 * hits / np.maximum(predicted + real, 1)


def with_error(one: dict, full: dict, draws: int = 2000) -> tuple[float, float, float]:
    """(F1, its share of the full adapter's, the standard error of the share).

    The error is a bootstrap over windows, with the same windows drawn for both.

    Raises:
        RankallocError: the full adapter has an F1 of 0 on some draw, so that there is no share of it.
    """
    rows = np.random.default_rng(0).integers(0, len(full["counts"]), (draws, len(full["counts"])))
    ours, theirs = np.array(one["counts"]), np.array(full["counts"])
    whole = f1(theirs[rows])
    if not whole.all():
        raise RankallocError("the full adapter has F1 0 on some windows drawn; train it with more --steps")
    shares = f1(ours[rows]) / whole
    return float(f1(ours)), float(f1(ours) / f1(theirs)), float(shares.std(ddof=1))


def summary(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each adapter, in the order of the table."""
    measured, of = record["measured"], f"of {record['rate']:g}"
    full = measured[f"full {record['rate']:g}"]
    rows = [{"kind": "full", "share": 1.0, "name": "full", **_row(full, full)}]
    for kind in KINDS:
        for share in record["shares"]:
            if f"{kind} {share:g} {of}" in measured:
                rows.append({"kind": kind, "share": share, **_row(measured[f"{kind} {share:g} {of}"], full)})
    for kind in TRAINED_FURTHER:
        tried = [name for name in measured if name.startswith(f"{kind} {FURTHER_SHARE:g} {of} further")]
        if tried:
            name = min(tried, key=lambda name: measured[name]["tune"]["loss"])
            label = f"{kind}, then {measured[name]['further_steps']} steps at {name.split()[-1]}"
            rows.append({"kind": label, "share": FURTHER_SHARE, **_row(measured[name], full)})
    return rows


def _row(one: dict, full: dict) -> dict[str, Any]:
    value, kept, error = with_error(one, full)
    return {
        "params": one["params"], "f1": value, "kept": kept, "standard_error": error, "loss": one["report"]["loss"],
        "error": one.get("error"),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    header = ("adapter", "parameters", "share", "F1", "of the full adapter's ± standard error", "loss", "‖·‖ error")
    return markdown(header, [
        (
            r["kind"], f"{r['params']:,}", f"{r['share']:.3f}", f"{r['f1']:.4f}",
            f"{r['kept']:.4f} ± {r['standard_error']:.4f}", f"{r['loss']:.4f}",
            "" if r["error"] is None else f"{r['error']:.3f}",
        )
        for r in rows
    ])  # fmt: skip
