"""The record of what was tried: tried.json, a line for each task, size, variant and rate."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rankalloc.errors import DataError
from rankalloc.files import write_text

from .runs import Job, Outcome

TRIED, FIRST_LOOK, HERE = "tried", "first look", "this code"
"""Lists of cells, by the code that made them: its exploratory version, an earlier one of that, and the present one."""


class Tried:
    """tried.json: {list: {"made": how, "cells": [...]}}.

    A cell has the mean loss on the tune split in nats a word, its standard deviation and number over seeds, and the
    loss of each seed; null where training diverged.

    Raises:
        DataError: the file is not JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.lists: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}); restore it, or write elsewhere with --output") from error

    def cells(self, name: str) -> list[dict[str, Any]]:
        """The cells of a list."""
        return self.lists.get(name, {}).get("cells", [])

    def done(self, name: str) -> set[Job]:
        """The runs that a list has."""
        return {
            Job(c["task"], c["size"], c["variant"], c["rate"], c["steps"], int(seed))
            for c in self.cells(name) for seed in c["losses"]
        }

    def add(self, name: str, made: str, found: Iterable[tuple[Job, Outcome]]) -> None:
        """Put finished runs into a list's cells."""
        own = self.lists.setdefault(name, {"made": made, "cells": []})
        own["made"] = made
        cells = {tuple(cell[key] for key in _KEY): cell for cell in own["cells"]}
        for job, outcome in found:
            key = tuple(getattr(job, field) for field in _KEY)
            if key not in cells:
                cells[key] = dict(zip(_KEY, key, strict=True)) | {"accuracies": {}, "losses": {}}
                own["cells"].append(cells[key])
            cell = cells[key]
            cell["losses"][str(job.seed)] = outcome.loss
            cell["accuracies"][str(job.seed)] = round(outcome.accuracy, 4)
            cell["params"] = max(outcome.params, cell.get("params", 0))
            cell |= _summary(cell["losses"].values())

    def save(self) -> None:
        """Write the record, a cell on each line."""
        lists = []
        for name, own in self.lists.items():
            lines = ",\n".join("  " + json.dumps(_ordered(cell), allow_nan=False) for cell in own["cells"])
            lists.append(f' {json.dumps(name)}: {{"made": {json.dumps(own["made"])}, "cells": [\n{lines}\n ]}}')
        write_text(self.path, "{\n" + ",\n".join(lists) + "\n}\n")


_KEY = ("task", "size", "variant", "rate", "steps")
_ORDER = (*_KEY, "mean", "sd", "n", "params", "losses", "accuracies")


def _ordered(cell: dict[str, Any]) -> dict[str, Any]:
    return {key: cell[key] for key in _ORDER}


def _summary(losses: Iterable[float | None]) -> dict[str, Any]:
    known = [math.inf if loss is None else loss for loss in losses]
    mean = statistics.fmean(known)
    if not math.isfinite(mean):
        return {"mean": None, "sd": None, "n": len(known)}
    sd = round(statistics.stdev(known), 6) if len(known) > 1 else None
    return {"mean": round(mean, 6), "sd": sd, "n": len(known)}
