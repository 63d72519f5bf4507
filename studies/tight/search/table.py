"""What was tried in Markdown: every variant beside the base rule, at its own best rate, sorted by the difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...common import grid
from ...common.paired import t_interval
from ...common.table import interval, markdown
from ..arms import TASKS
from .tried import FIRST_LOOK, HERE, TRIED, Tried
from .variants import BASE, VARIANTS

Cells = Sequence[dict[str, Any]]

HEAD = """# What was tried

Every variant beside the base rule that the search began from ("base": a warm-up of 10 of 96 steps, no look-ahead).
"look-ahead, warm-up 4" was adopted; as the package's default it is a warm-up of a twentieth, 5 of 96 steps.

The loss is that on the tune split, in nats a word; lower is better. A difference is the variant's loss minus base's,
each at its own best rate, over the seeds that both have, with a 95 % t interval. Rates are chosen by the very losses
that are compared, for base as for the others, and one interval in twenty leaves out zero by chance: this is how the
rule was found, not how it is judged. It is judged on other seeds and on the report split, by
`python -m studies.tight`."""

TITLES = {TRIED: "Tried", FIRST_LOOK: "First look", HERE: "Tried by this code"}


class Row(NamedTuple):
    """A variant on one task: mean loss at its best rate, and the difference to base with its interval, if any."""

    rate: float
    at_edge: bool
    loss: float
    seeds: int
    difference: tuple[float, float, float] | None


def row_of(cells: Cells, task: str, size: str, variant: str) -> Row | None:
    """A variant beside base on one task and size; None where it has not been tried, or always diverged."""
    own, base = (_best(cells, task, size, name) for name in (variant, BASE))
    if own is None:
        return None
    rate, rates, losses = own
    difference = None
    if base is not None and variant != BASE:
        pairs = [(losses[seed], base[2][seed]) for seed in losses.keys() & base[2].keys()]
        if len(pairs) > 1:
            difference = t_interval([one - other for one, other in pairs])
    edge = len(rates) > 1 and rate in (min(rates), max(rates))
    return Row(rate, edge, statistics.fmean(losses.values()), len(losses), difference)


def _best(cells: Cells, task: str, size: str, variant: str) -> tuple[float, list[float], dict[str, float]] | None:
    """(best rate, all rates, {seed: loss} at the best one)."""
    mine = [c for c in cells if (c["task"], c["size"], c["variant"]) == (task, size, variant)]
    means = grid.mean_losses(((c["rate"], math.inf if c["mean"] is None else c["mean"]) for c in mine), 1)
    rate = grid.best_rate(means)
    if rate is None:
        return None
    return rate, list(means), next(c["losses"] for c in mine if c["rate"] == rate)


def report(tried: Tried) -> str:
    """The whole file."""
    parts = [HEAD]
    for name, title in TITLES.items():
        cells = tried.cells(name)
        if not cells:
            continue
        parts += [f"## {title}", tried.lists[name]["made"]]
        for size in dict.fromkeys(cell["size"] for cell in cells):
            parts += [f"### {size} rank a layer" if size != "one" else "### one rank a layer", _table(cells, size)]
            parts += [said for said in [_sentence(cells, size)] if said]
    return "\n\n".join(parts) + "\n"


def rows_of(cells: Cells, size: str) -> list[tuple[str, dict[str, Row]]]:
    """(variant, {task: row}), best first: by the mean over tasks of the difference to base, which is 0 for base."""
    found = []
    for variant in dict.fromkeys(cell["variant"] for cell in cells if cell["size"] == size):
        rows = {task: row for task in TASKS if (row := row_of(cells, task, size, variant))}
        found.append((variant, rows))
    return sorted(found, key=lambda pair: _merit(*pair))


def _merit(variant: str, rows: dict[str, Row]) -> float:
    known = [row.difference[0] for row in rows.values() if row.difference]
    return 0.0 if variant == BASE else statistics.fmean(known) if known else math.inf


def _table(cells: Cells, size: str) -> str:
    rows = rows_of(cells, size)
    tasks = [task for task in TASKS if any(task in own for _, own in rows)]
    header = ["variant", "what it changes"]
    for task in tasks:
        header += [f"{task}: loss", "minus base"]
    return markdown(header, [
        [variant, words_of(variant), *(text for task in tasks for text in _texts(own.get(task)))]
        for variant, own in rows
    ])  # fmt: skip


def _texts(row: Row | None) -> tuple[str, str]:
    if row is None:
        return "–", "–"
    edge = " at an edge" if row.at_edge else ""
    difference = row.difference
    said = "" if difference is None else f"{difference[0]:+.4f} ({interval(*difference[1:])})"
    return f"{row.loss:.4f} ({row.seeds} seeds, rate {row.rate:g}{edge})", said


def words_of(variant: str) -> str:
    """What a variant changes; the ranks that a rule found in a first run, trained from scratch, are named so."""
    if variant in VARIANTS:
        return VARIANTS[variant].words
    return "the ranks that a run of that rule ended with, trained from the start"


def _sentence(cells: Cells, size: str) -> str:
    """Which variants differ from base on every task that they were tried on."""
    lower, higher = [], []
    for variant, rows in rows_of(cells, size):
        intervals = [row.difference for row in rows.values() if row.difference]
        if intervals and all(high < 0 for _, _, high in intervals):
            lower.append(variant)
        if intervals and all(low > 0 for _, low, _ in intervals):
            higher.append(variant)
    said = [f"{what} on every task tried, with intervals that leave out zero: {'; '.join(names)}."
            for what, names in (("Lower", lower), ("Higher", higher)) if names]  # fmt: skip
    return " ".join(said)
