"""The record of an audit: which arms were compared, what each scored, and what follows.

Plain data like :mod:`rankalloc.trace`, stored as versioned JSON. Differences are signed so that a positive one is in
the favour of the method that is audited, whatever the direction of the metric.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from .files import write_json
from .records import Record, finite, load_record
from .trace import EnvironmentRecord, LayerRecord

AUDIT_NAME: Final = "audit.json"
AUDIT_STUDY: Final = "audit.db"

Claim = Literal["better", "worse", "equivalent", "undecided"]
Next = Literal["method", "other arm", "uniform", "more seeds"]


class TriedRate(Record):
    """A learning rate at which an arm was tuned, and its value on the tune split; None where the run failed."""

    rate: float
    value: float | None = None
    message: str | None = None


class ArmRun(Record):
    """One run of an arm on a seed of the comparison. ``value`` is the metric on the report split and ``loss`` the loss
    there, ``tune`` the metric on the tune split; ``params`` are those of what ships, ``peak_params`` the most during
    training; ``ranks`` are in the order of :attr:`AuditRecord.layers`, None where the arm has none."""

    seed: int
    value: float | None = None
    loss: float | None = None
    tune: float | None = None
    params: int | None = None
    peak_params: int | None = None
    ranks: list[int] | None = None
    steps: int = 0
    seconds: float = 0.0
    folder: str | None = None
    message: str | None = None


class ArmRecord(Record):
    """One arm: ``what`` it is, in a phrase; why it was ``skipped`` (None: it ran); the rates it was tuned at and the
    one chosen, whether that one is the lowest or highest tried; its runs, by seed; the command that trains it."""

    name: str
    what: str
    skipped: str | None = None
    tried: list[TriedRate] = Field(default_factory=list)
    rate: float | None = None
    at_edge: bool = False
    runs: list[ArmRun] = Field(default_factory=list)
    command: str | None = None

    def values(self, seeds: int) -> list[float]:
        """The metric on the report split for the first ``seeds`` seeds."""
        return [run.value for run in self.runs[:seeds] if run.value is not None]


class ComparisonRecord(Record):
    """The audited method against one arm, over ``seeds`` paired seeds. ``mean`` is in units of the metric; ``low`` and
    ``high`` are its limits over the looks so far, each wrong with a chance of at most 5 % (a 90 % interval);
    ``both_low`` and ``both_high`` also hold the variance over the report split's examples; ``p`` is the sequential
    p-value, ``effect`` Hedges' g of the paired differences. Without any spread of these there are no limits."""

    arm: str
    claim: Claim
    seeds: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float
    effect: float | None = None
    both_low: float | None = None
    both_high: float | None = None
    differences: list[float]


class StabilityRecord(Record):
    """How alike the method's ranks are from seed to seed: mean Spearman correlation of the layers' ranks, and mean
    Jaccard overlap of the rank units, over all pairs of seeds."""

    rank_correlation: float | None = None
    jaccard: float | None = None


class AuditRecord(Record):
    """An audit at the time of writing. ``params`` is the size that every arm was given, in parameters of the LoRA that
    ships; ``margin`` the difference that counts as none; ``sentence`` and ``advice`` are the answer, in words."""

    version: Literal[1] = 1
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    name: str
    task: str
    model: str
    metric: str
    direction: Literal["minimize", "maximize"]
    method: str
    params: int
    layers: list[LayerRecord] = Field(default_factory=list)
    margin: float
    looks: list[int]
    open_ended: bool = False
    seeds: int = 0
    arms: list[ArmRecord] = Field(default_factory=list)
    comparisons: list[ComparisonRecord] = Field(default_factory=list)
    stability: StabilityRecord = StabilityRecord()
    sentence: str | None = None
    details: list[str] = Field(default_factory=list)
    follow: Next | None = None
    advice: str | None = None
    command_next: str | None = None
    examples: int | None = None
    steps: int = 0
    seconds: float = 0.0
    command: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    data_fingerprint: str | None = None
    environment: EnvironmentRecord | None = None
    alerts: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    finished: bool = False

    def arm(self, name: str) -> ArmRecord:
        """The arm of this name. Raises KeyError when there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)

    def comparison(self, arm: str) -> ComparisonRecord | None:
        """The method against this arm; None while there is no such comparison."""
        return next((one for one in self.comparisons if one.arm == arm), None)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the record as JSON, whole or not at all."""
        return write_json(path, finite(self.model_dump(mode="json")))

    @classmethod
    def load(cls, path: str | os.PathLike) -> AuditRecord:
        """Read an audit's record; raises :class:`RankallocError` as :meth:`rankalloc.RankTrace.load` does."""
        return load_record(cls, path, "audit record")
