"""The queue of a sweep. As many slots as trials are wanted are made beforehand, and a worker only ever takes one that
waits, so that any number of workers, started in any order, meets the total exactly.

A slot is a waiting Optuna trial that knows its number (``slot``): its folder, its seed and the number it is shown with.
Taking one is a change of state from WAITING to RUNNING, which the storage grants to one worker alone. A worker that has
to stop puts *the same trial* back, with the parameters it has drawn; what was lost without a word (a killed process)
is put back by whoever finds it. Two workers that fill an empty study at once make two trials for a slot: the one with
the lower number counts, and the other is closed when it comes up.

A slot's number above :data:`FRESH` stands for another one trained again with a seed of its own: 20003 is trial 3 with
its second further seed. Such slots are made when all trials have ended (:mod:`rankalloc.experiments.sweeps.finals`),
and are none of the trials that are counted, shown or chosen from.

SQLite lets two processes change one row's state one after the other without noticing, so a lock file guards it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from itertools import count
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from .space import SAMPLED

FRESH = 10_000
SLOT, LAST, OWNER, DEATHS, DRAW = "slot", "last", "owner", "deaths", "draw"
_UNSIGNED = 600  # seconds
_FIXED = "fixed_params"  # Optuna's own name for the parameters of a queued trial
_PASSED_ON = (SLOT, LAST, DEATHS, DRAW, "role", "match_params", "rate", "folder")


def slot_of(trial: FrozenTrial | optuna.Trial) -> int:
    """The number a trial is shown with. Studies of before had no slots: there it is Optuna's."""
    return int(trial.user_attrs.get(SLOT, trial.number))


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial stands for its slot: not when it was lost with its process or closed as surplus."""
    return trial.state != TrialState.FAIL or "message" in trial.user_attrs


def ended(trial: FrozenTrial) -> bool:
    """Whether a trial has a result, a failure of its own included."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and "message" in trial.user_attrs
    )


def with_seed(slot: int, seed: int) -> int:
    """The slot of a trial trained again with its ``seed``-th further seed."""
    return slot + FRESH * seed


def of_slot(number: int) -> tuple[int, int]:
    """(the trial, which of its further seeds) that a slot is for."""
    return number % FRESH, number // FRESH


def of_slots(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    """{slot: the trial that stands for it}, by slot; further seeds apart."""
    return {slot: trial for slot, trial in _standing(trials).items() if slot < FRESH}


def _standing(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    found: dict[int, FrozenTrial] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        if counts(trial):
            found.setdefault(slot_of(trial), trial)
    return dict(sorted(found.items()))


class Slots:
    """The slots of one study.

    Args:
        study: the study.
        storage: what it is kept in.
        guard: a lock that all processes share, where the storage alone cannot grant a trial to one of them.
    """

    def __init__(
        self, study: optuna.Study, storage: BaseStorage, guard: AbstractContextManager[Any] | None = None
    ) -> None:
        self.study, self.storage = study, storage
        self.guard = guard or nullcontext()

    def all(self) -> dict[int, FrozenTrial]:
        """{slot: its trial}."""
        return of_slots(self.study.get_trials(deepcopy=False))

    def again(self) -> dict[int, FrozenTrial]:
        """{slot: its trial} of those that are trained again with further seeds."""
        return {slot: t for slot, t in _standing(self.study.get_trials(deepcopy=False)).items() if slot >= FRESH}

    def ensure(self, points: Mapping[int, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> int:
        """Make those of the slots {slot: (parameters, attributes)} that are missing; how many have no result."""
        with self.guard:
            have = _standing(self.study.get_trials(deepcopy=False))
            for slot, (params, attrs) in points.items():
                if slot not in have:
                    self.study.enqueue_trial(dict(params), user_attrs={SLOT: slot, **attrs})
            have = _standing(self.study.get_trials(deepcopy=False))
        return sum(not ended(have[slot]) for slot in points)

    def fill(self, wanted: int, points: Sequence[tuple[Mapping[str, Any], str]]) -> None:
        """Make the slots that are missing up to ``wanted``; the first ones are given (parameters, role)."""
        with self.guard:
            have = self.all()
            fresh = (slot for slot in count() if slot not in have)
            for _ in range(wanted - len(have)):
                slot = next(fresh)
                params, role = points[slot] if slot < len(points) else ({}, SAMPLED)
                last = {LAST: True} if slot == wanted - 1 and slot >= len(points) else {}
                self.study.enqueue_trial(dict(params), user_attrs={SLOT: slot, "role": role, **last})

    def first(self, wanted: int) -> list[FrozenTrial]:
        """The trials of the first ``wanted`` slots: fewer wanted than before leaves the rest waiting."""
        return list(self.all().values())[:wanted]

    def left(self, wanted: int) -> int:
        """How many of the first ``wanted`` slots have no result yet."""
        return wanted - sum(ended(trial) for trial in self.first(wanted))

    def take(self, wanted: int) -> FrozenTrial | None:
        """Claim a waiting slot for this process; None when none is to be had now. The last slot, whose point follows
        from all others, waits for them."""
        with self.guard:
            self._close_surplus()
            trials = [*self.first(wanted), *self.again().values()]
            waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
            others = [trial for trial in waiting if not trial.user_attrs.get(LAST)]
            if not others and any(trial.state == TrialState.RUNNING for trial in trials):
                return None
            for trial in others or waiting[:1]:
                if self._claim(trial):
                    self.storage.set_trial_user_attr(trial._trial_id, OWNER, _owner())
                    return self.storage.get_trial(trial._trial_id)
        return None

    def fix(self, trial: FrozenTrial, params: Mapping[str, Any], **attrs: Any) -> None:
        """Give a claimed trial the parameters it is to have."""
        self.storage.set_trial_system_attr(trial._trial_id, _FIXED, dict(params))
        for name, value in attrs.items():
            self.storage.set_trial_user_attr(trial._trial_id, name, value)

    def put_back(self, trial: FrozenTrial) -> None:
        """Let another worker, or this one later, go on with a trial that runs."""
        try:
            self.storage.set_trial_user_attr(trial._trial_id, OWNER, "")
            self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        except UpdateFinishedTrialError:
            pass  # it ended after all

    def orphans(self, dead: Sequence[int] = ()) -> list[FrozenTrial]:
        """Running trials whose process, on this host, is no more; ``dead``: processes known to have ended."""
        host, found = socket.gethostname(), []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            at, _, pid = trial.user_attrs.get(OWNER, "").rpartition(":")
            if not pid:  # claimed, and not signed yet: the process was killed in between only if that was long ago
                begun = trial.datetime_start
                if begun is not None and (datetime.now() - begun).total_seconds() > _UNSIGNED:
                    found.append(trial)
            elif at == host and (int(pid) in dead or not _alive(int(pid))):
                found.append(trial)
        return found

    def _close_surplus(self) -> None:
        standing = {trial.number for trial in _standing(self.study.get_trials(deepcopy=False)).values()}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            if trial.number not in standing and self._claim(trial):
                self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _claim(self, trial: FrozenTrial) -> bool:
        try:
            if self.storage.get_trial(trial._trial_id).state != TrialState.WAITING:
                return False
            return self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False


def queue_again(study: optuna.Study, trial: FrozenTrial, params: Mapping[str, Any], **attrs: Any) -> None:
    """Queue the slot of a trial that is over without a result; without ``params`` a new point is drawn."""
    kept = {name: trial.user_attrs[name] for name in _PASSED_ON if name in trial.user_attrs}
    study.enqueue_trial(dict(params), user_attrs={SLOT: slot_of(trial), **kept, **attrs})


def _owner() -> str:
    """This process, as a trial records it."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _alive(pid: int) -> bool:
    if pid == 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
