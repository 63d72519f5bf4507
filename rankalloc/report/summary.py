"""A report for scripts: the same facts as plain values, in a schema that only grows.

``schema`` and ``version`` name it. Keys that do not apply to a record are null or empty, never missing, so that a
script reads every kind alike; a later version of the package may add keys, and changes the version when one goes or
means something else.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..records import finite
from .alerts import alerts_of
from .audited import audit_of, outcome_of, sentence_of
from .exports import table_records
from .facts import Facts, Subject
from .finished import CheckRecord, CutRecord
from .following import steps_of
from .outcome import budget_state, reached
from .sections_finished import cut_sentence, frontiers_sentence
from .verdict import Verdict, verdict
from .verdict_compare import compared
from .wording import count

SCHEMA = "rankalloc.report"
VERSION = 1


def verdict_of(page: Subject) -> Verdict:
    """The verdict of a page of any kind."""
    if page.comparison is not None:
        return compared(page.comparison)
    if page.run is not None or page.sweep is not None:
        return verdict(page.run, page.sweep)
    if "audit" in page.parts:
        record_of_audit = audit_of(page.parts)
        return Verdict(sentence_of(record_of_audit), outcome_of(record_of_audit), list(record_of_audit.details))
    if "cut" in page.parts:
        return Verdict(cut_sentence(CutRecord.model_validate(page.parts["cut"])), "cannot tell")
    if "frontier" in page.parts:
        return Verdict(frontiers_sentence(page), "cannot tell")
    record = CheckRecord.model_validate(page.parts["check"])
    return Verdict(
        f"{count(record.params)} of {count(record.stored)} numbers in the file are needed without any loss.",
        "cannot tell",
    )


def summary(page: Subject, title: str | None = None) -> dict[str, Any]:
    """The page as plain values for JSON."""
    said = verdict_of(page)
    beside = page.other if page.comparison is None else None
    other = {} if beside is None else {"other": dict(beside.parts)}
    found = {
        "schema": SCHEMA,
        "version": VERSION,
        "kind": page.kind,
        "name": title or page.name,
        "created": page.created or None,
        "verdict": {"outcome": said.outcome, "sentence": said.sentence, "notes": said.notes},
        "next": [{"advice": step.advice, "command": step.command or None} for step in steps_of(page)],
        "alerts": [asdict(alert) for alert in alerts_of(page)],
        "budget": None if page.run is None else _budget(page.run),
        "adapter_params": None if page.run is None else page.run.trace.adapter_params_final,
        "quality": _quality(page),
        "cost": None if page.run is None else _cost(page.run),
        "layers": [] if page.run is None else table_records(page.run.layers),
        "trials": [asdict(row) for row in page.trials],
        "parts": dict(page.parts) | other,
        "comparison": _comparison(page),
    }
    return finite(found)


def _budget(run: Facts) -> dict[str, Any]:
    budget = run.trace.budget
    return {
        "unit": budget.unit, "target": budget.target, "reached": reached(run.trace), "initial": budget.initial,
        "state": budget_state(run.trace), "uniform_rank": run.uniform_rank,
    }


def _quality(page: Subject) -> list[dict[str, Any]]:
    runs = [(page.run_name, page.run), ("uniform trial", page.control)]
    if page.comparison is not None and page.other is not None:
        runs = list(zip(page.comparison.names, (page.run, page.other.run), strict=True))
    return [asdict(row) | {"run": name} for name, run in runs if run is not None for row in run.evaluations]


def _cost(run: Facts) -> dict[str, Any]:
    keys = (
        "adapter_params_initial", "adapter_params_final", "allocator_state_bytes", "wall_seconds",
        "step_seconds_before_freeze", "step_seconds_after_freeze",
    )
    return {key: getattr(run.trace, key) for key in keys}


def _comparison(page: Subject) -> dict[str, Any] | None:
    pair = page.comparison
    if pair is None:
        return None
    return {
        "names": list(pair.names),
        "params": [pair.one.params, pair.other.params],
        "ranks": [sum(layer.rank for layer in side.layers) for side in (pair.one, pair.other)],
        "equal_size": pair.equal_size,
        "rank_correlation": pair.correlation,
        "layer_overlap": pair.layer_overlap,
        "rank_overlap": pair.rank_overlap,
        "paired": None if pair.paired is None else asdict(pair.paired),
        "quality": [
            {"split": split, "metric": name, "first": one, "second": other} for split, name, one, other in pair.quality
        ],
        "settings": [{"key": key, "first": one, "second": other} for key, one, other in pair.settings],
        "layers": [
            {"name": x.name, "block": x.block, "role": x.role, "first": x.one, "second": x.other, "change": x.change}
            for x in pair.layers
        ],
    }
