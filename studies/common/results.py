"""A study's JSON file: every finished run, written after each one, so that no run is ever repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rankalloc.errors import DataError
from rankalloc.files import write_json
from rankalloc.training.environment import describe


class Results:
    """The record in ``path``, or an empty one.

    Args:
        path: the JSON file; need not exist.
        threads: torch threads of each run, recorded with the environment. Runs are trained in worker processes, so
            the present process cannot be asked.
        empty: the lists and dictionaries of a new record; default ``runs=[]``.

    Raises:
        DataError: the file is not JSON.
    """

    def __init__(self, path: Path, threads: int = 1, **empty: Any) -> None:
        self.path, self.threads = path, threads
        try:
            self.record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}); restore it, or write elsewhere with --output") from error
        for name, value in (empty or {"runs": []}).items():
            self.record.setdefault(name, value)

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Every finished run; studies narrow this to the runs that belong to the settings asked for."""
        return self.record["runs"]

    def add(self, run: dict[str, Any]) -> None:
        """Keep one more finished run."""
        self.record["runs"].append(run)
        self.stamp()
        self.save()

    def stamp(self) -> None:
        """Record the present environment as that of the latest run."""
        self.record["environment"] = {**describe("cpu").model_dump(), "threads": self.threads}

    def save(self) -> None:
        """Write the record. A reader never sees half a file."""
        write_json(self.path, self.record)
