"""Reading the subject of a report: a folder, a file, or a record in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RankallocError
from ..records import Record, finite, parse_record, read_json
from ..trace import SWEEP_NAME, TRACE_NAME, RankTrace, SweepRecord, TrialRecord
from .sweeps import control_of


@dataclass(frozen=True)
class Source:
    """The records of one report. ``trace`` is the run, or the sweep's best trial; ``control`` is the uniform trial
    shown beside it. At least one of ``trace`` and ``sweep`` is there."""

    trace: RankTrace | None
    sweep: SweepRecord | None = None
    control: RankTrace | None = None

    def dump(self) -> dict[str, Any]:
        """As strict JSON: the file beside the page, from which the same page can be made again."""
        parts = {"trace": self.trace, "sweep": self.sweep, "control": self.control}
        return {key: None if part is None else finite(part.model_dump(mode="json")) for key, part in parts.items()}


def read_source(source: RankTrace | SweepRecord | str | os.PathLike) -> Source:
    """Read a run's or a sweep's folder, ``trace.json``, ``sweep.json`` or a report's own JSON.

    Raises:
        RankallocError: nothing is there, it is damaged, or its lists do not fit its layers.
    """
    found = _read(source)
    for trace in (found.trace, found.control):
        if trace is not None:
            _check_lengths(trace, source)
    return found


def _read(source: RankTrace | SweepRecord | str | os.PathLike) -> Source:
    if isinstance(source, RankTrace):
        return Source(source)
    if isinstance(source, SweepRecord):
        return Source(None, source)
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in (SWEEP_NAME, TRACE_NAME) if (path / name).is_file()), path)
        if path.is_dir():
            raise RankallocError(
                f"no {SWEEP_NAME} and no {TRACE_NAME} in {path}; give the folder a run or a sweep wrote to"
            )
    if not path.exists():
        raise RankallocError(
            f"nothing to report on at {path}; give the folder of a run or a sweep, or one of its JSON files"
        )
    data = read_json(path, "trace, sweep record or report's data")
    if is_report_data(data):
        return _combined(data, path)
    if isinstance(data, dict) and "trials" in data:
        return _with_traces(parse_record(SweepRecord, data, str(path), "sweep record"), path.parent)
    return Source(parse_record(RankTrace, data, str(path), "trace"))


def is_report_data(data: Any) -> bool:
    """Whether parsed JSON is the data beside a page, and not a run's or a sweep's own record."""
    return isinstance(data, dict) and {"trace", "sweep"} <= set(data)


def would_lose(path: Path) -> bool:
    """Whether ``path`` holds anything but a report's own data, which a report must not write over."""
    try:
        return path.exists() and not is_report_data(read_json(path, "report's data"))
    except RankallocError:
        return True


def _with_traces(sweep: SweepRecord, folder: Path) -> Source:
    best = next((t for t in sweep.trials if t.number == sweep.best), None)
    trace = _trial_trace(folder, best)
    control = control_of(sweep)
    beside = _trial_trace(folder, control) if control is not None and control is not best else None
    return Source(trace, sweep, beside if trace is not None else None)


def _trial_trace(folder: Path, trial: TrialRecord | None) -> RankTrace | None:
    """The trial's trace, or None when it has none; a path that leaves the sweep's folder is refused."""
    if trial is None or not trial.trace:
        return None
    path = (folder / trial.trace).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise RankallocError(f"trial {trial.number} names a trace outside its sweep's folder ({trial.trace}); not read")
    return RankTrace.load(path) if path.is_file() else None


def _combined(data: dict[str, Any], path: Path) -> Source:
    def part(cls: type[Record], key: str, what: str) -> Any:
        value = data.get(key)
        return None if value is None else parse_record(cls, value, f"{key!r} in {path}", what)

    records = Source(
        trace=part(RankTrace, "trace", "trace"),
        sweep=part(SweepRecord, "sweep", "sweep record"),
        control=part(RankTrace, "control", "trace"),
    )
    if records.trace is None and records.sweep is None:
        raise RankallocError(f"{path} holds neither a trace nor a sweep")
    return records


def _check_lengths(trace: RankTrace, source: object) -> None:
    lists: list[tuple[str, Sequence[Any]]] = [(f"the allocation at step {a.step}", a.ranks) for a in trace.allocations]
    if trace.scores is not None:
        lists += [("scores.kept", trace.scores.kept), ("scores.dropped", trace.scores.dropped)]
        lists += [("scores.left", trace.scores.left)] if trace.scores.left else []
    if trace.singular_values is not None:
        lists.append(("singular_values", trace.singular_values))
    for what, values in lists:
        if len(values) != len(trace.layers):
            where = "the trace" if isinstance(source, Record) else str(source)
            raise RankallocError(f"{where} is damaged: {what} has {len(values)} entries for {len(trace.layers)} layers")
