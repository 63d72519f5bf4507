"""What a report can be about: the records of one page, and the kinds of record that it is made from.

A further kind of record is one file, which holds its :class:`Kind`, and one line in :data:`.source.KINDS`. Kinds that
are neither run nor sweep keep their data in :attr:`Source.parts` under their name, where sections of their own find it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records import finite
from ..trace import RankTrace, SweepRecord
from .side import Side


@dataclass(frozen=True)
class Source:
    """The records of one report. ``trace`` is the run, or the sweep's best trial; ``control`` is the uniform trial
    shown beside it. ``parts`` holds records of further kinds as plain data, by kind. ``notes`` say what could not be
    read, and ``other`` is what all this is compared with; ``place`` is then the end of the path that tells the two
    apart. At least one of ``trace``, ``sweep`` and ``parts`` is there."""

    trace: RankTrace | None
    sweep: SweepRecord | None = None
    control: RankTrace | None = None
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    other: Source | None = None
    place: str = ""

    def dump(self) -> dict[str, Any]:
        """As strict JSON: the file beside the page, from which the same page can be made again."""
        records = {"trace": self.trace, "sweep": self.sweep, "control": self.control}
        made: dict[str, Any] = {
            key: None if one is None else finite(one.model_dump(mode="json")) for key, one in records.items()
        }
        if self.parts:
            made["parts"] = finite(dict(self.parts))
        if self.notes:
            made["notes"] = list(self.notes)
        if self.place:
            made["place"] = self.place
        return made | ({} if self.other is None else {"other": self.other.dump()})


@dataclass(frozen=True)
class Kind:
    """A kind of record.

    Attributes:
        name: as messages and :attr:`Source.parts` call it.
        file: its name in the folder that a command writes; None when it has none.
        claims: whether parsed JSON is such a record.
        read: the source in it; the path says where it was, for what lies beside it and for messages.
        title: the heading of its page, from the data in :attr:`Source.parts`; None for runs and sweeps.
        side: the record as one side of a comparison; None when it cannot be compared.
    """

    name: str
    file: str | None
    claims: Callable[[Mapping[str, Any]], bool]
    read: Callable[[dict[str, Any], Path], Source]
    side: Callable[[Source], Side] | None = None
    title: Callable[[Mapping[str, Any]], str] | None = None
