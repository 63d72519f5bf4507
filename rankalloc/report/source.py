"""Reading the subject of a report: a folder, a file, or a record in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RankallocError
from ..recognise import RUN, what_is
from ..records import Record, finite, read_json
from ..trace import SWEEP_NAME, TRACE_NAME, RankTrace, SweepRecord, TrialRecord
from .absent import no_record, nothing_in, unclaimed, way_out_of
from .audited import AUDIT
from .finished import CHECK, CUT, FRONTIER
from .kinds import Kind, Source
from .lenient import R, read_patiently
from .redact import redacted, redacted_text
from .side import Side, SideLayer
from .sweeps import control_of

Given = RankTrace | SweepRecord | str | os.PathLike
"""What a report can be asked about."""


def read_source(source: Given, compare: Given | None = None) -> Source:
    """Read a folder that a command wrote, one of its JSON files, a report's own JSON, or a record in memory.

    What must not be shared is hidden (:mod:`.redact`), and what is odd is left out with a note (:mod:`.lenient`).

    Raises:
        RankallocError: nothing is there, it is damaged, its lists do not fit its layers, or the two cannot be compared.
    """
    found = _read(source)
    if compare is not None:
        places = told_apart(source, compare)
        other = replace(_read(compare), other=None, place=places[1])
        found = replace(found, other=other, place=places[0])
    for part, name in ((found, source), (found.other, compare)):
        for trace in (part.trace, part.control) if part is not None else ():
            if trace is not None:
                _check_lengths(trace, name)
    if found.other is not None and not are_frontiers(found):
        for part in (found, found.other):
            side_of(part)
    return found


def are_frontiers(source: Source) -> bool:
    """Whether two frontiers are compared: they have sizes and no ranks by layer.

    Raises:
        RankallocError: they do not measure the same.
    """
    both = [part.parts.get(FRONTIER.name) for part in (source, source.other) if part is not None]
    first, second = both if len(both) == 2 else (None, None)
    if first is None or second is None:
        return False
    if first["metric"] != second["metric"]:
        raise RankallocError(
            f"one frontier measures {first['metric']} and the other {second['metric']}; compare two of the same metric"
        )
    return True


def side_of(source: Source) -> Side:
    """The source as one side of a comparison.

    Raises:
        RankallocError: it has no ranks to compare.
    """
    kind = next((kind for kind in KINDS if kind.name in source.parts), SWEEP if source.sweep is not None else TRACE)
    if kind.side is None:
        raise RankallocError(
            f"the record of a {kind.name} has no ranks by layer, so nothing but another of its kind stands beside it; "
            "give two of these: a run, a sweep, an audit, a cut or checked adapter"
        )
    return replace(kind.side(source), place=source.place)


def told_apart(one: Given, other: Given) -> tuple[str, str]:
    """The ends of two paths, as short as tells one from the other: ``a`` and ``b``, or ``a/run`` and ``b/run``. Empty
    for records in memory, and for one path given twice."""
    if isinstance(one, Record) or isinstance(other, Record):
        return "", ""
    first, second = (_place(Path(path)) for path in (one, other))
    for length in range(1, max(len(first), len(second)) + 1):
        if first[-length:] != second[-length:]:
            return redacted_text("/".join(first[-length:])), redacted_text("/".join(second[-length:]))
    return "", ""


def _place(path: Path) -> tuple[str, ...]:
    """The parts of a record's folder, or of a file that has a name of its own."""
    if path.name in {kind.file for kind in KINDS}:
        path = path.parent
    return path.resolve().parts if path.is_dir() else path.with_suffix("").resolve().parts


def is_report_data(data: Any) -> bool:
    """Whether parsed JSON is the data beside a page, and not a run's or a sweep's own record."""
    return isinstance(data, dict) and {"trace", "sweep"} <= set(data)


def would_lose(path: Path) -> bool:
    """Whether ``path`` holds anything but a report's own data, which a report must not write over."""
    try:
        return path.exists() and not is_report_data(read_json(path, "report's data"))
    except RankallocError:
        return True


def _read(source: Given) -> Source:
    if isinstance(source, Record):
        read = _read_trace if isinstance(source, RankTrace) else _read_bare_sweep
        return read(redacted(finite(source.model_dump(mode="json"))), Path("the record"))
    path = Path(source)
    names = [kind.file for kind in KINDS if kind.file is not None]
    if path.is_dir():
        path = next((path / name for name in names if (path / name).is_file()), path)
        if path.is_dir():
            raise RankallocError(nothing_in(path, names))
    if said := no_record(path):
        raise RankallocError(said)
    named = next((kind.name for kind in KINDS if kind.file == path.name), None)
    try:
        data = read_json(path, "record" if named is None else f"{'run' if named == TRACE.name else named}'s record")
    except RankallocError as error:
        raise RankallocError(f"{error}{way_out_of(path)}") from None
    kind = next((kind for kind in KINDS if isinstance(data, dict) and kind.claims(data)), None)
    if kind is None and (said := unclaimed(data, path)):
        raise RankallocError(said)
    return (kind or TRACE).read(redacted(data), path)


def _parse(cls: type[R], data: Any, where: str, what: str) -> tuple[R, tuple[str, ...]]:
    record, notes = read_patiently(cls, data, where, what)
    return record, tuple(notes)


def _read_trace(data: dict[str, Any], path: Path) -> Source:
    trace, notes = _parse(RankTrace, data, str(path), "trace")
    return Source(trace, notes=notes)


def _read_sweep(data: dict[str, Any], path: Path) -> Source:
    sweep, notes = _parse(SweepRecord, data, str(path), "sweep record")
    best = next((t for t in sweep.trials if t.number == sweep.best), None)
    trace, more = _trial_trace(path.parent, best)
    control = control_of(sweep)
    beside, last = _trial_trace(path.parent, control) if control is not None and control is not best else (None, ())
    return Source(trace, sweep, beside if trace is not None else None, notes=(*notes, *more, *last))


def _read_bare_sweep(data: dict[str, Any], path: Path) -> Source:
    sweep, notes = _parse(SweepRecord, data, str(path), "sweep record")
    return Source(None, sweep, notes=notes)


def _trial_trace(folder: Path, trial: TrialRecord | None) -> tuple[RankTrace | None, tuple[str, ...]]:
    """The trial's trace, or None when it has none; a path that leaves the sweep's folder is refused."""
    if trial is None or not trial.trace:
        return None, ()
    path = (folder / trial.trace).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise RankallocError(f"trial {trial.number} names a trace outside its sweep's folder ({trial.trace}); not read")
    if not path.is_file():
        return None, ()
    return _parse(RankTrace, redacted(read_json(path, "trace")), str(path), "trace")


def _read_combined(data: dict[str, Any], path: Path) -> Source:
    notes: list[str] = []

    def part(cls: type[R], key: str, what: str) -> R | None:
        value = data.get(key)
        if value is None:
            return None
        record, more = _parse(cls, value, f"{key!r} in {path}", what)
        notes.extend(more)
        return record

    trace, control = (part(RankTrace, key, "trace") for key in ("trace", "control"))
    sweep = part(SweepRecord, "sweep", "sweep record")
    parts: dict[str, Any] = {}
    given = data.get("parts")
    for kind in KINDS:
        if isinstance(given, dict) and kind.name in given:
            parts |= kind.read(given[kind.name], path).parts
    other = data.get("other")
    said = data.get("notes")
    records = Source(
        trace, sweep, control, parts,
        notes=(*(str(note) for note in (said if isinstance(said, list) else ())), *notes),
        other=_read_combined(other, path) if isinstance(other, dict) else None,
        place=str(data.get("place") or ""),
    )
    if records.trace is None and records.sweep is None and not parts:
        raise RankallocError(f"{path} holds neither a trace nor a sweep")
    return records


def _run_side(source: Source) -> Side:
    """A run, or a sweep's best trial.

    Raises:
        RankallocError: the sweep's best trial has no trace.
    """
    trace = source.trace
    if trace is None:
        name = "it" if source.sweep is None else source.sweep.name
        raise RankallocError(f"the best trial of {name} has no trace beside it, so there are no ranks to compare")
    return Side(
        name=trace.name if source.sweep is None else source.sweep.name,
        what=f"best trial, number {source.sweep.best}" if source.sweep is not None else "run",
        layers=[
            SideLayer(layer.name, layer.block, layer.role, rank, layer.d_in + layer.d_out)
            for layer, rank in zip(trace.layers, trace.final_ranks, strict=True)
        ],
        choice=trace.rank_choice,
        quality={record.split: record.metrics for record in trace.evaluations},
        losses={record.split: record.example_losses for record in trace.evaluations if record.example_losses},
        fingerprint=trace.data_fingerprint,
        config={**trace.config, "method": trace.method, "method_options": trace.method_options, "seed": trace.seed},
        trace=trace,
        command=trace.command,
    )


TRACE = Kind("trace", TRACE_NAME, lambda data: what_is(data) == RUN, _read_trace, _run_side)
SWEEP = Kind("sweep", SWEEP_NAME, lambda data: "trials" in data, _read_sweep, _run_side)
COMBINED = Kind("report's data", None, is_report_data, _read_combined)

KINDS: tuple[Kind, ...] = (COMBINED, AUDIT, SWEEP, TRACE, CUT, FRONTIER, CHECK)
"""Every kind of record. Of a folder, the first whose file is there is read."""


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
