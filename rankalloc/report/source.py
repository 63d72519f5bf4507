"""Reading what a report is about: a folder, a file, or a record in memory."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rankalloc.errors import RankallocError
from rankalloc.trace import SWEEP_NAME, TRACE_NAME, TRACE_VERSION, RankTrace, SweepRecord, TrialRecord, finite

from .sweeps import control_of


@dataclass(frozen=True)
class Source:
    """The records of one report. ``trace`` is the run, or the sweep's best trial; ``control`` the
    uniform trial set beside it. Either of ``trace`` and ``sweep`` may be None, not both."""

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
    data = _json(path)
    if is_report_data(data):
        return _combined(data, path)
    if isinstance(data, dict) and "trials" in data:
        return _read_sweep(path)
    return Source(RankTrace.load(path))


def is_report_data(data: Any) -> bool:
    """Whether parsed JSON is what a report puts beside its page, and not a run's or sweep's own record."""
    return isinstance(data, dict) and {"trace", "sweep"} <= set(data)


def would_lose(path: Path) -> bool:
    """Whether ``path`` holds anything but a report's own data, which a report must not write over."""
    try:
        return path.exists() and not is_report_data(_json(path))
    except RankallocError:
        return True


def _read_sweep(path: Path) -> Source:
    sweep = SweepRecord.load(path)
    best = next((t for t in sweep.trials if t.number == sweep.best), None)
    trace = _trial_trace(path.parent, best)
    control = control_of(sweep)
    beside = _trial_trace(path.parent, control) if control is not None and control is not best else None
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
    parts = {
        "trace": _part(RankTrace, data["trace"], path, "trace", TRACE_VERSION),
        "sweep": _part(SweepRecord, data["sweep"], path, "sweep", 1),
        "control": _part(RankTrace, data.get("control"), path, "control", TRACE_VERSION),
    }
    if parts["trace"] is None and parts["sweep"] is None:
        raise RankallocError(f"{path} holds neither a trace nor a sweep")
    return Source(**parts)


def _part(cls: type[BaseModel], value: Any, path: Path, key: str, version: int) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("version") != version:
        found = value.get("version") if isinstance(value, dict) else type(value).__name__
        raise RankallocError(f"{path}: {key} has version {found!r}, and this rankalloc reads version {version}")
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (key, *first["loc"]))
        raise RankallocError(f"{path} is no valid report data: {where}: {first['msg']}") from None


def _check_lengths(trace: RankTrace, source: object) -> None:
    lists = [(f"the allocation at step {a.step}", a.ranks) for a in trace.allocations]
    if trace.scores is not None:
        lists += [("scores.kept", trace.scores.kept), ("scores.dropped", trace.scores.dropped)]
        lists += [("scores.left", trace.scores.left)] if trace.scores.left else []
    if trace.singular_values is not None:
        lists.append(("singular_values", trace.singular_values))
    for what, values in lists:
        if len(values) != len(trace.layers):
            where = "the trace" if isinstance(source, BaseModel) else str(source)
            raise RankallocError(f"{where} is damaged: {what} has {len(values)} entries for {len(trace.layers)} layers")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RankallocError(f"{path} is no JSON (line {error.lineno}); it may be damaged") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RankallocError(f"could not read {path}: {error}") from error
