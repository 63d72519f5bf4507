"""The facts of a page, each worked out once, however many sections use it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..trace import RankTrace, SweepRecord
from . import curves, grids, sweeps, tables
from .source import Source


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
    At least one of ``run`` and ``sweep`` is there; ``control`` never comes without ``run``."""

    run: Facts | None
    sweep: SweepRecord | None = None
    control: Facts | None = None

    @classmethod
    def of(cls, records: Source) -> Subject:
        run, control = (None if trace is None else Facts(trace) for trace in (records.trace, records.control))
        return cls(run, records.sweep, control)

    @property
    def record(self) -> RankTrace | SweepRecord:
        """The record that names and dates the page."""
        if self.sweep is not None:
            return self.sweep
        if self.run is None:
            raise ValueError("a page needs a trace or a sweep")
        return self.run.trace

    @property
    def run_name(self) -> str:
        """What tables call the run."""
        return "this run" if self.sweep is None else "best trial"

    @cached_property
    def trials(self) -> list[sweeps.TrialRow]:
        return [] if self.sweep is None else sweeps.trial_rows(self.sweep)
