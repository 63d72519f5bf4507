"""The user's data as splits of checked rows: those given, those a set has of its own, or shares of the train set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import DataError
from ..file_task import FileTask
from .base import SPLITS
from .cells import Mistake
from .reading import Table, read_tables
from .text_files import also


@dataclass
class Row:
    """One example: the table it is from, its number there, and what was read of it."""

    table: Table
    index: int
    values: dict[str, Any]

    @property
    def where(self) -> str:
        """The file and the line, or the set and the row."""
        return self.table.where(self.index)


Reader = Callable[[dict[str, Any], Table], dict[str, Any]]
"""Turns a row's columns into what the task needs, or raises a Mistake."""


HELD_OUT = 200
"""Rows kept from the beginning of a stream for a split that has none of its own and no limit."""


@dataclass
class Splits:
    """What was read.

    Attributes:
        rows: "train", "tune" and "report"; of a train set that is streamed its first rows, to look at.
        stream: the train set that is streamed, without what is held out of it.
        notes: remarks on how it was read.
    """

    rows: dict[str, list[Row]]
    stream: Table | None
    notes: list[str]


def read_splits(
    task: FileTask,
    needed: Sequence[str],
    read: Reader,
    key: Callable[[Row], str],
    labels: Callable[[Row], set[str]],
    limits: Mapping[str, int | None],
) -> Splits:
    """"train", "tune" and "report" as lists of rows.

    Args:
        needed: columns that every table must have.
        read: what becomes of a row's columns.
        key: rows of equal keys are never in two splits.
        labels: the classes of a row, all of which training must see.
        limits: of each split; of what is streamed only so many rows are read for "tune" and "report".

    Raises:
        DataError: a table cannot be read; rows are wrong, of which the first is told, with the others' lines; or the
            train set is too small to be split.
    """
    tables = read_tables(task, needed)
    stream = tables["train"] if task.streaming else None
    splits = {
        split: checked(_beginning(table, limits[split] or HELD_OUT) if task.streaming else table, read)
        for split, table in tables.items()
    }
    missing = {split: getattr(task, f"{split}_share") for split in SPLITS[1:] if split not in splits}
    notes = [note for table in tables.values() for note in table.notes]
    if missing and stream is not None:
        sizes = {split: limits[split] or HELD_OUT for split in missing}
        first = checked(_beginning(stream, sum(sizes.values()) + 1), read)
        if len(first) <= sum(sizes.values()):
            raise DataError(
                f"{task.train} ends within the first {sum(sizes.values())} rows, which are held out of a stream for "
                f"{' and '.join(missing)}; set data.limit_tune and data.limit_report lower, or give separate files"
            )
        for split, size in sizes.items():
            splits[split], first = first[:size], first[size:]
        stream = replace(stream, rows=stream.rows.skip(sum(sizes.values())), first=sum(sizes.values()))
        splits["train"] = checked(_beginning(stream, limits["train"] or HELD_OUT), read)
        held = " and ".join(f"{size} for {split}" for split, size in sizes.items())
        notes.append(f"the first rows of the stream are held out: {held}")
    elif missing:
        rows = splits["train"]
        splits |= split_rows(rows, missing, key, labels)
        if not all(splits.values()):
            labelled = " and each label more than once" if any(map(labels, rows)) else ""
            raise DataError(
                f"{task.train} is too small to split into train, {' and '.join(missing)}: it has {len(rows)} "
                f"row{'s' * (len(rows) != 1)}, and needs at least {len(missing) + 1} that differ{labelled}; or give "
                f"separate files as {' and '.join(f'task.{split}' for split in missing)}"
            )
    return Splits({split: splits[split] for split in SPLITS}, stream, list(dict.fromkeys(notes)))


def _beginning(table: Table, rows: int) -> Table:
    return replace(table, rows=table.rows.take(rows))


def checked(table: Table, read: Reader) -> list[Row]:
    """All rows of a table as ``read`` reads them. Raises DataError on the first that it cannot, with the places of up
    to five others."""
    rows: list[Row] = []
    first: str | None = None
    others: list[int] = []
    for index, values in enumerate(table):
        try:
            rows.append(Row(table, index, read(values, table)))
        except Mistake as mistake:
            if first is None:
                first = f"{table.where(index)}: {mistake}"
            else:
                others.append(table.number(index))
    if first is not None:
        raise DataError(first + also(others, "row" if table.lines is None else "line"))
    return rows


def split_rows(
    rows: list[Row], shares: dict[str, float], key: Callable[[Row], str], labels: Callable[[Row], set[str]]
) -> dict[str, list[Row]]:
    """``rows`` as "train" and the splits named in ``shares`` (share of the distinct texts, at least one).

    Texts are assigned in the order of their SHA-256: the same file gives the same splits, equal texts are never in
    two splits, and rows keep their order. A text with a label that training would not see stays in training. A
    split that could not be filled is empty.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    order = sorted(groups, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    held: dict[str, list[str]] = {}
    start = 0
    for split, share in shares.items():
        size = max(1, round(share * len(order)))
        held[split] = order[start : start + size]
        start += size
    trained = order[start:]
    seen = {label for text in trained for i in groups[text] for label in labels(rows[i])}
    for split, texts in held.items():
        kept: list[str] = []
        for text in texts:
            own = {label for i in groups[text] for label in labels(rows[i])}
            (kept if own <= seen else trained).append(text)
            seen |= own
        held[split] = kept
    return {
        split: [rows[i] for i in sorted(i for text in texts for i in groups[text])]
        for split, texts in {"train": trained, **held}.items()
    }
