"""One worker of a sweep: takes slots, trains them, tells what came out, and puts back what it could not finish."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from ...errors import NotWrittenError, RankallocError, first_line
from ..config import RunConfig
from ..preemption import Preempted, Stop
from .finals import left
from .goals import OUT_OF_MEMORY, best_of
from .pruning import pruner_of
from .record import Sweep, choice_of
from .samplers import sampler_of
from .slots import DEATHS, DRAW, LAST, Slots, ended, queue_again, slot_of
from .space import MATCHED, SAMPLED, search_space, suggest
from .trials import SAVED, SPENT, objectives_of, out_of_memory

OnTrial = Callable[[FrozenTrial, int], None]
"""Called with a trial that has ended and how many have."""

_POLL = 0.5  # seconds between two looks for a slot, where all that are left are being trained elsewhere
_DRAWS = 8  # points drawn for a slot before one that was tried is taken again
_ALIKE = 3  # equal failures in a row that end a sweep
_MOST_DEATHS = 5  # of processes that trained one trial without getting on, after which it counts as failed
_SAVED_THEN = "saved at death"


def work(sweep: Sweep, slots: Slots, wanted: int, stop: Stop, on_trial: OnTrial | None = None) -> None:
    """Train slots until all ``wanted`` have a result, here or elsewhere; raises as :func:`work_through`."""
    work_through(
        slots, wanted, lambda: left(slots, sweep.config, wanted), lambda taken: _one(sweep, slots, taken, stop), stop,
        on_trial,
    )


def work_through(
    slots: Slots, wanted: int, remaining: Callable[[], int], one: Callable[[FrozenTrial], FrozenTrial | None],
    stop: Stop, on_trial: OnTrial | None = None, failures: Failures | None = None,
) -> None:
    """Take slots and do ``one`` after another while some are ``remaining``; None of ``one`` is no result.

    Raises:
        Preempted: ``stop`` said so; the trial in hand was put back, with a checkpoint where a step had been made.
        RepeatedFailureError: trials failed one after another for the same reason.
    """
    failures = failures or Failures()
    while remaining():
        if stop():
            raise Preempted("stopped between two trials")
        take_up(slots)
        taken = slots.take(wanted)
        if taken is None:
            time.sleep(_POLL)
            continue
        done = one(taken)
        if done is None:
            continue
        if on_trial is not None:
            on_trial(done, sum(map(ended, slots.all().values())))
        failures.see(done)


class RepeatedFailureError(RankallocError):
    """Trials of a sweep failed one after another for the same reason, which more of them would not mend."""


class Failures:
    """Notices trials that fail one after another for the same reason; those that ``matter``, all by default."""

    def __init__(self, matter: Callable[[FrozenTrial], bool] = lambda trial: True) -> None:
        self._messages: list[str | None] = []
        self._matter = matter

    def see(self, trial: FrozenTrial) -> None:
        """Take note of a trial that has ended; RepeatedFailureError when it and those just before failed alike."""
        if not self._matter(trial):
            return
        failed = trial.state == TrialState.FAIL or OUT_OF_MEMORY in trial.constraints
        self._messages = [*self._messages, trial.user_attrs.get("message")][-_ALIKE:] if failed else []
        if len(self._messages) == _ALIKE and len(set(self._messages)) == 1:
            raise RepeatedFailureError(
                f"{_ALIKE} trials in a row failed alike: {self._messages[0]}; mend that and start the same command "
                "again: it goes on with the trials that are left"
            )


def take_up(slots: Slots, dead: tuple[int, ...] = ()) -> None:
    """Put back the trials whose process is gone; one that has ended several is told to have failed."""
    with slots.guard:
        for trial in slots.orphans(dead):
            attrs = trial.user_attrs
            # a checkpoint that is newer than the last death's: the trial gets on, and begins to count anew
            got_on = attrs.get(SAVED, 0) > attrs.get(_SAVED_THEN, 0)
            deaths = 1 if got_on else attrs.get(DEATHS, 0) + 1
            slots.storage.set_trial_user_attr(trial._trial_id, DEATHS, deaths)
            slots.storage.set_trial_user_attr(trial._trial_id, _SAVED_THEN, attrs.get(SAVED, 0))
            if deaths < _MOST_DEATHS:
                slots.put_back(trial)
                continue
            slots.storage.set_trial_user_attr(
                trial._trial_id, "message", f"its process was killed {deaths} times (out of memory, perhaps)"
            )
            slots.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(slots.study)


def _one(sweep: Sweep, slots: Slots, taken: FrozenTrial, stop: Stop) -> FrozenTrial | None:
    """Train one slot; its trial with the result, or None when another point was to be drawn."""
    study = slots.study
    if taken.user_attrs.get(LAST) and not taken.params:
        _make_matched(slots, taken, sweep.config)
    study.sampler = sampler_of(sweep.config, slot_of(taken), taken.user_attrs.get(DRAW, 0))
    study.pruner = pruner_of(sweep.config, sweep.prepared)
    with heartbeat(slots, taken):
        trial = optuna.trial.Trial(study, taken._trial_id)
        params = suggest(trial, search_space(sweep.config))
        twin = _tried(slots, trial, params)
        draws = trial.user_attrs.get(DRAW, 0)
        if twin is not None and draws < _DRAWS:
            study.tell(trial, state=TrialState.FAIL)
            queue_again(study, taken, {}, **{DRAW: draws + 1})
            return None
        return settled(slots, taken, trial, lambda: objectives_of(sweep, trial, params, stop))


def settled(
    slots: Slots, taken: FrozenTrial, trial: optuna.Trial, train: Callable[[], Sequence[float]]
) -> FrozenTrial:
    """Have a slot trained, and tell its study what came out: values, or why there are none. What was interrupted, or
    found no place for its files, is put back, and raised."""
    before = time.perf_counter()

    def spent() -> float:
        return trial.user_attrs.get(SPENT, 0.0) + time.perf_counter() - before

    try:
        values = train()
    except optuna.TrialPruned as pruned:
        state, message = TrialState.PRUNED, str(pruned)
    except BaseException as error:  # Ctrl-C, too
        if out_of_memory(error):  # not a failure: a place that does not fit, which the sampler then avoids
            trial.set_constraint(OUT_OF_MEMORY, 1.0)
            state, message = TrialState.PRUNED, f"out of memory: {first_line(error)}"
        elif isinstance(error, RankallocError) and not isinstance(error, (Preempted, NotWrittenError)):
            state, message = TrialState.FAIL, str(error)
        else:
            trial.set_user_attr(SPENT, spent())
            slots.put_back(taken)
            raise
    else:
        return slots.study.tell(trial, values)
    _give_back_memory()
    trial.set_user_attr("message", message)
    trial.set_user_attr("seconds", spent())
    return slots.study.tell(trial, state=state)


def _give_back_memory() -> None:
    """What a run that broke off still holds, so that the next one has it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def heartbeat(slots: Slots, trial: FrozenTrial) -> Iterator[None]:
    """Signs of life while a trial trains, in storages that keep them: other hosts cannot look for the process."""
    storage: Any = slots.storage
    interval = storage.get_heartbeat_interval() if hasattr(storage, "get_heartbeat_interval") else None
    if interval is None:
        yield
        return
    over = threading.Event()

    def beat() -> None:
        while True:
            storage.record_heartbeat(trial._trial_id)
            if over.wait(interval):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _tried(slots: Slots, trial: optuna.Trial, params: dict[str, Any]) -> FrozenTrial | None:
    """Another trial at a point that was drawn."""
    if trial.user_attrs.get("role", SAMPLED) != SAMPLED:
        return None
    others = [one for one in slots.all().values() if one.number != trial.number and one.state != TrialState.WAITING]
    return next((one for one in others if one.params == params and not one.user_attrs.get("match_params")), None)


def _make_matched(slots: Slots, taken: FrozenTrial, config: RunConfig) -> None:
    """Make the last slot uniform LoRA with the best adaptive trial's parameters, unless one as large, to within one
    rank, has run."""
    complete = [trial for trial in slots.all().values() if trial.state == TrialState.COMPLETE]
    adaptive = best_of([t for t in complete if choice_of(t, config) == "adaptive"], slots.study)
    uniform = [t for t in complete if choice_of(t, config) == "uniform"]
    if adaptive is None or "uniform" not in search_space(config)["method"]["choices"]:
        return
    size = adaptive.user_attrs["adapter_params"]
    cheapest = adaptive.user_attrs["params_per_rank"]
    if any(size - cheapest < t.user_attrs["adapter_params"] <= size for t in uniform):
        return
    rate = (best_of(uniform, slots.study) or adaptive).params["learning_rate"]
    params = {**adaptive.params, "method": "uniform", "learning_rate": rate}
    slots.fix(taken, params, role=MATCHED, match_params=size)
