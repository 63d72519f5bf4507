"""The data that a page's script works with: one block of JSON, safe inside HTML whatever the names in it.

``tables`` holds the tables whose rows are cells of figures or can be saved, in full precision; ``frames`` the ranks of
each layer at each allocation, thinned where there are very many.
"""

from __future__ import annotations

import json
from typing import Any

from .exports import TABLE_COLUMNS, table_records
from .facts import Facts, Subject
from .tables import thin

MOST_RANKS = 150_000  # numbers in all frames of a run
MOST_FRAMES = 200
SAID = ("role", "block", "initial_rank", "final_rank", "params", "effective_rank")
"""The columns that are told of a cell, beside its name."""


def page_data(page: Subject) -> dict[str, Any]:
    """What the page's script needs, for JSON."""
    found: dict[str, Any] = {"tables": {}, "frames": {}}
    both = [page.run] if page.other is None else [page.run, page.other.run]
    for place, run in enumerate(both):
        if run is not None:
            name = f"layers{place or ''}"
            found["tables"][name] = _layers(run)
            found["frames"][name] = {**_frames(run), "top": highest_rank(page)}
    if page.comparison is not None:
        columns = ["name", "role", "block", "first", "second", "change"]
        rows = [[x.name, x.role, x.block, x.one, x.other, x.change] for x in page.comparison.layers]
        found["tables"]["pairs"] = {"columns": columns, "rows": rows, "said": columns[1:]}
    return found


def highest_rank(page: Subject) -> int:
    """The end of the rank maps' common scale."""
    runs = [page.run, page.other.run if page.other is not None else None]
    return max((rank for run in runs if run is not None for rank in run.trace.final_ranks), default=0)


def block(page: Subject) -> str:
    """:func:`page_data` as text that can stand in a script element: no ``<`` is left to end it."""
    text = json.dumps(page_data(page), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _layers(run: Facts) -> dict[str, Any]:
    rows = [list(record.values()) for record in table_records(run.layers)]
    return {"columns": list(TABLE_COLUMNS), "rows": rows, "said": list(SAID)}


def _frames(run: Facts) -> dict[str, Any]:
    past = run.history
    most = max(2, min(MOST_FRAMES, MOST_RANKS // max(1, len(run.layers))))
    picked = thin(len(past.steps), most)
    return {"steps": [past.steps[k] for k in picked], "ranks": [past.ranks[k] for k in picked]}
