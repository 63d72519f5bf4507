"""A train set that is streamed: its features are made while training goes on, and it has no length.

Its passes follow each other without an end, so that a run which is resumed finds its place by counting batches: of the
end of a pass, which nobody knows beforehand, the Trainer could not tell on which step it came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import datasets

from ...errors import DataError
from .base import Features
from .cells import Mistake
from .reading import Table

SHUFFLED = 1000
"""Features that a stream is shuffled among."""

_TOGETHER = 32  # rows that are tokenised at once, so that documents fill blocks


def streamed(
    table: Table,
    encode: Callable[[Sequence[dict[str, Any]], Table], Features],
    limit: int | None,
    seed: int,
    notes: list[str],
) -> datasets.IterableDataset:
    """The features of a table, shuffled among the next :data:`SHUFFLED` with ``seed``: pass after pass, each in an
    order of its own.

    Args:
        encode: rows' columns to features, which may be fewer or more; raises Mistake.
        limit: the rows that are read; None for all.
        notes: gets what is to be said of it.

    Raises:
        DataError: in training, when a row is wrong; it names the row.
    """
    rows = table if limit is None else replace(table, rows=table.rows.take(limit))
    notes.append(f"the train set is streamed, and shuffled among the next {SHUFFLED} examples at a time")

    def one_pass() -> Iterator[dict[str, Any]]:
        gathered: list[dict[str, Any]] = []
        for index, values in enumerate(rows):
            gathered.append(values)
            if len(gathered) == _TOGETHER:
                yield from _encoded(table, encode, gathered, index + 1 - len(gathered))
                gathered = []
        yield from _encoded(table, encode, gathered, index + 1 - len(gathered) if gathered else 0)

    shuffled = datasets.IterableDataset.from_generator(one_pass).shuffle(seed=seed, buffer_size=SHUFFLED)

    def features() -> Iterator[dict[str, Any]]:
        for number in count():
            shuffled.set_epoch(number)
            examples = iter(shuffled)
            first = next(examples, None)
            if first is None:
                return
            yield first
            yield from examples

    return datasets.IterableDataset.from_generator(features)


def _encoded(
    table: Table, encode: Callable[[Sequence[dict[str, Any]], Table], Features], rows: list[dict[str, Any]], first: int
) -> Features:
    try:
        return encode(rows, table) if rows else []
    except Mistake:
        for index, values in enumerate(rows, start=first):  # to tell which
            try:
                encode([values], table)
            except Mistake as mistake:
                raise DataError(f"{table.where(index)}: {mistake}") from None
        raise
