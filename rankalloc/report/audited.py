"""The record of ``rankalloc audit`` as a page has it, and how its numbers are written."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..audit_record import AUDIT_NAME, AuditRecord, ComparisonRecord
from ..errors import RankallocError
from .kinds import Kind, Source
from .lenient import read_patiently
from .side import Side, SideLayer
from .wording import MINUS, Outcome, plural

SHARES = (
    "f1", "accuracy", "macro_f1", "exact_match", "matthews", "precision", "recall", "token_accuracy", "rouge1",
    "rougeL", "reward_accuracy",
)  # fmt: skip
"""Metrics from 0 to 1, whose differences people give in points: hundredths."""


def difference(value: float, metric: str, sign: bool = False) -> str:
    """A difference as people say it: in points for a share, the plain number for other metrics."""
    plus = "+" if sign else ""
    text = f"{100 * value:{plus}.1f}" if metric in SHARES else f"{value:{plus}.3g}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("+-")


def unit(metric: str) -> str:
    """What follows a difference: "points F1", or "in loss"."""
    name = "F1" if metric == "f1" else metric.replace("_", " ")
    return f"points {name}" if metric in SHARES else f"in {name}"


def limits(one: ComparisonRecord, metric: str) -> str:
    """The interval of a comparison, in words."""
    if one.low is None or one.high is None:
        return "the same difference on every seed"
    return f"90 % {difference(one.low, metric, True)} to {difference(one.high, metric, True)}"


def audit_of(parts: Mapping[str, Mapping[str, Any]]) -> AuditRecord:
    """The record among the parts of a page."""
    return AuditRecord.model_validate(parts["audit"])


def outcome_of(record: AuditRecord) -> Outcome:
    """What adaptive ranks did, beside tuned uniform LoRA."""
    claim = next((one.claim for one in record.comparisons if one.arm == "uniform"), "undecided")
    found: dict[str, Outcome] = {"better": "helped", "worse": "hurt"}
    return found.get(claim, "cannot tell")


def sentence_of(record: AuditRecord) -> str:
    """The answer; while there is none, how far the audit is."""
    if record.sentence is not None:
        return record.sentence
    return f"This audit has no answer yet: {sum(len(arm.tried) + len(arm.runs) for arm in record.arms)} runs are made."


def _side(source: Source) -> Side:
    """The audited method: its ranks on the first seed of the comparison, its quality as the mean over all.

    Raises:
        RankallocError: no seed has been run yet.
    """
    record = audit_of(source.parts)
    arm = record.arms[0] if record.arms else None
    run = None if arm is None else next((run for run in arm.runs if run.ranks is not None), None)
    if arm is None or run is None or run.ranks is None:
        raise RankallocError(f"the audit {record.name} has made no run with ranks yet, so there is nothing to compare")
    quality = {
        name: statistics.fmean(values) for name, values in (
            ("loss", [one.loss for one in arm.runs if one.loss is not None]),
            (record.metric, [one.value for one in arm.runs if one.value is not None]),
        ) if values
    }  # fmt: skip
    given = record.config.get("training")
    training = dict(given) if isinstance(given, Mapping) else {}
    if arm.rate is not None:
        training["learning_rate"] = arm.rate
    seeds = sum(one.value is not None for one in arm.runs)
    return Side(
        name=record.name,
        what=f"audit of {record.method}: quality over {plural(seeds, 'seed')}, ranks of seed {run.seed}",
        layers=[
            SideLayer(layer.name, layer.block, layer.role, rank, layer.d_in + layer.d_out)
            for layer, rank in zip(record.layers, run.ranks, strict=True)
        ],
        choice="adaptive", quality={"report": quality}, fingerprint=record.data_fingerprint,
        config={**record.config, "training": training, "seed": run.seed},
        command=arm.command, seeds=seeds,
    )  # fmt: skip


def _read(data: dict[str, Any], path: Path) -> Source:
    record, notes = read_patiently(AuditRecord, data, str(path), "audit record")
    return Source(None, parts={"audit": record.model_dump(mode="json")}, notes=tuple(notes))


AUDIT = Kind(
    "audit", AUDIT_NAME, lambda data: {"arms", "comparisons", "looks"} <= set(data), _read, _side,
    title=lambda data: str(data["name"]),
)
