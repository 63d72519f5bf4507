"""The classes of a task from the user's own data."""

from __future__ import annotations

import re
from typing import Any

from ...errors import DataError
from ..file_task import FileTask
from .base import SPLITS
from .reading import Table
from .splitting import Row


def named_label(values: dict[str, Any], column: str, table: Table) -> Any:
    """A row's label: of a column of classes their name, as the set's own features have it."""
    given = values[column]
    feature: Any = (table.rows.features or {}).get(column)
    return feature.int2str(given) if hasattr(feature, "int2str") and isinstance(given, int) else given


def row_labels(row: Row) -> set[str]:
    """The classes that a row names."""
    label = row.values.get("label")
    return set(label) if isinstance(label, list) else {label} if isinstance(label, str) else set()


def label_names(rows: list[Row]) -> list[str]:
    """The classes of all rows in order; whole numbers as numbers."""
    labels = set().union(*map(row_labels, rows))
    whole = all(re.fullmatch(r"[+-]?\d{1,18}", label) for label in labels)
    return sorted(labels, key=lambda label: (int(label), label) if whole else label)


def check_labels(task: FileTask, splits: dict[str, list[Row]], names: list[str]) -> None:
    """Raise DataError when there is one class only, or one that training does not see."""
    if task.kind in ("regression", "causal-lm"):
        return
    if len(names) < 2:
        raise DataError(f"{task.train}: all rows have the label {names[0]!r}; there is nothing to tell apart")
    for split in SPLITS[1:]:
        for row in splits[split]:
            unseen = sorted(row_labels(row) - set(names))
            if unseen:
                raise DataError(
                    f"{row.where}: label {unseen[0]!r} does not occur in training; known: {', '.join(names)}"
                )
