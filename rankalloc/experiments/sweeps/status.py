"""How far a sweep is, read from its storage alone: on any machine, while others train."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from optuna.trial import TrialState

from ...trace import TrialRecord
from ..tasks import metric_of
from . import storages
from .finals import fresh_values, winner
from .record import trial_record
from .slots import OWNER, slot_of
from .study import join_study


@dataclass(frozen=True)
class Running:
    """A trial that is being trained: by which process, ``host:pid``, and since how many seconds."""

    trial: TrialRecord
    worker: str
    seconds: float


@dataclass(frozen=True)
class Status:
    """A sweep at the moment. ``counts`` has the trials by state, ``fresh_left`` the runs with fresh seeds that are
    queued or running, ``seconds_left`` an estimate (None: nothing to go by)."""

    name: str
    metric: str
    wanted: int
    counts: dict[str, int]
    fresh_left: int
    best: TrialRecord | None
    running: list[Running]
    failed: list[TrialRecord]
    seconds_left: float | None


def status_of(storage: str, name: str | None = None) -> Status:
    """The status of the study in a storage, or of the one of that name.

    Raises:
        ConfigError: there is no such storage or study.
        RankallocError: the storage cannot be opened.
    """
    slots, config, wanted = join_study(storages.named(storage), name)
    trials, again = slots.first(wanted), slots.again()
    every = [*trials, *again.values()]
    records = {trial.number: trial_record(trial, config, Path()) for trial in every}
    now = datetime.now()
    running = [
        Running(records[t.number], t.user_attrs.get(OWNER, ""), (now - (t.datetime_start or now)).total_seconds())
        for t in every if t.state == TrialState.RUNNING
    ]
    left = sum(t.state in (TrialState.WAITING, TrialState.RUNNING) for t in every)
    took = [records[t.number].seconds or 0.0 for t in every if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    best, fresh = winner(slots, config), fresh_values(slots, config)
    return Status(
        name=config.name, metric=metric_of(config).metric, wanted=wanted,
        counts=dict(Counter(records[trial.number].state for trial in trials)),
        fresh_left=sum(t.state in (TrialState.WAITING, TrialState.RUNNING) for t in again.values()),
        best=None if best is None else records[best.number].model_copy(
            update={"fresh": fresh.get(slot_of(best), [])}
        ),
        running=running, failed=[records[t.number] for t in every if t.state == TrialState.FAIL],
        seconds_left=left * statistics.fmean(took) / max(1, len(running)) if took else None,
    )  # fmt: skip
