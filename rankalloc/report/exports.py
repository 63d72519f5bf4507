"""The ranks for reuse: as a PEFT pattern, as a rankalloc call, as CSV and JSON."""

from __future__ import annotations

import csv
import io
import re

from ..trace import BASELINES, RankTrace
from .tables import LayerRow


def rank_pattern(trace: RankTrace) -> dict[str, int]:
    """PEFT's ``rank_pattern``: ``^`` + the escaped name, because PEFT matches keys as regular
    expressions at the end of a name. Layers of rank 0, which PEFT rejects, are left out."""
    pairs = zip(trace.layers, trace.final_ranks, strict=True)
    return {"^" + re.escape(layer.name): r for layer, r in pairs if r > 0}


def excluded(trace: RankTrace) -> list[str]:
    """Names of the layers that ended at rank 0."""
    return [layer.name for layer, r in zip(trace.layers, trace.final_ranks, strict=True) if r == 0]


TABLE_COLUMNS = (
    "name",
    "block",
    "role",
    "d_in",
    "d_out",
    "initial_rank",
    "final_rank",
    "params",
    "largest_singular_value",
    "effective_rank",
)


def table_csv(rows: list[LayerRow]) -> str:
    """The full table as CSV. A name that a spreadsheet would run as a formula gets a quote before it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(TABLE_COLUMNS)
    for row in rows:
        cells = ["" if (value := getattr(row, column)) is None else value for column in TABLE_COLUMNS]
        writer.writerow(["'" + c if isinstance(c, str) and c[:1] in "=+-@" and c else c for c in cells])
    return out.getvalue()


def table_records(rows: list[LayerRow]) -> list[dict]:
    """The full table as JSON-ready records, in the columns of :data:`TABLE_COLUMNS`."""
    return [{column: getattr(row, column) for column in TABLE_COLUMNS} for row in rows]


def attach_call(trace: RankTrace) -> str:
    """Python that attaches adapters of the final ranks to a model."""
    pairs = zip(trace.layers, trace.final_ranks, strict=True)
    ranks = "\n".join(f"        {layer.name!r}: {rank}," for layer, rank in pairs)
    alpha = trace.scaling * trace.rank  # correct for every ``scale`` the run was attached with
    init = f"    init={trace.method!r},\n" if trace.method in BASELINES else ""
    numbers = f"    rank={trace.rank},\n    alpha={alpha:g},\n{init}"
    return f"import rankalloc as ra\n\nra.attach(\n    model,\n{numbers}    ranks={{\n{ranks}\n    }},\n)"
