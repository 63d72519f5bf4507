"""The facts of a page, each worked out once, however many sections use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..trace import RankTrace, SweepRecord
from . import curves, grids, sweeps, tables
from .compare import Comparison
from .kinds import Source
from .source import KINDS, are_frontiers, side_of


@dataclass(frozen=True)
class Facts:
    """A run's trace and the rows made from it; see :mod:`.tables`."""

    trace: RankTrace

    @cached_property
    def groups(self) -> list[grids.Group]:
        return grids.groups(self.trace.layers)

    @cached_property
    def history(self) -> tables.History:
        return tables.history(self.trace)

    @cached_property
    def uniform_rank(self) -> float:
        return tables.uniform_rank(self.trace)

    @cached_property
    def spectra(self) -> list[list[float]]:
        return tables.spectra(self.trace)

    @cached_property
    def layers(self) -> list[tables.LayerRow]:
        return tables.layer_rows(self.trace, self.history.ranks[0], self.uniform_rank, self.spectra)

    @cached_property
    def rank_map(self) -> grids.RankMap:
        return grids.grid(self.groups, self.trace.final_ranks)

    @cached_property
    def scores(self) -> tables.ScoreTable | None:
        return tables.score_table(self.trace)

    @cached_property
    def evaluations(self) -> list[tables.EvaluationRow]:
        return tables.evaluation_rows(self.trace)

    @cached_property
    def curves(self) -> list[curves.Panel]:
        return curves.curves(self.trace)


@dataclass(frozen=True)
class Subject:
    """The subject of one page. ``run`` is a run, or a sweep's best trial, and ``control`` the uniform trial beside it.
    At least one of ``run``, ``sweep`` and ``parts`` is there; ``control`` never comes without ``run``. ``notes`` say
    what could not be read. A page that compares has ``other``, and ``comparison`` of the two where they have ranks by
    layer; ``place`` is then the end of the path that tells the two apart."""

    run: Facts | None
    sweep: SweepRecord | None = None
    control: Facts | None = None
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    other: Subject | None = None
    comparison: Comparison | None = None
    place: str = ""

    @classmethod
    def of(cls, records: Source) -> Subject:
        run, control = (None if trace is None else Facts(trace) for trace in (records.trace, records.control))
        other, pair = None, None
        if records.other is not None:
            other = cls.of(records.other)
            pair = None if are_frontiers(records) else Comparison(side_of(records), side_of(records.other))
        return cls(run, records.sweep, control, records.parts, records.notes, other, pair, records.place)

    @property
    def kind(self) -> str:
        """"comparison", "sweep", "run", or the name of a further kind of record."""
        if self.comparison is not None:
            return "comparison"
        return "sweep" if self.sweep is not None else "run" if self.run is not None else next(iter(self.parts))

    @property
    def name(self) -> str:
        """The heading of the page, where none was given."""
        if self.comparison is not None:
            return " and ".join(self.comparison.names)
        if self.sweep is not None:
            return self.sweep.name
        if self.run is not None:
            return self.run.trace.name
        title = next(kind.title(self.parts[kind.name]) for kind in KINDS if kind.title and kind.name in self.parts)
        return title if self.other is None or not self.place else f"{self.place} and {self.other.place}: {title}"

    @property
    def created(self) -> str:
        """When the record was made, where it says so."""
        if self.sweep is not None:
            return self.sweep.created
        if self.run is None:
            return next((str(part["created"]) for part in self.parts.values() if part.get("created")), "")
        return self.run.trace.created

    @property
    def run_name(self) -> str:
        """What tables call the run."""
        return "this run" if self.sweep is None else "best trial"

    @cached_property
    def trials(self) -> list[sweeps.TrialRow]:
        return [] if self.sweep is None else sweeps.trial_rows(self.sweep)
