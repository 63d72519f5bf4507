"""One worker of a sweep: takes slots, trains them, tells what came out, and puts back what it could not finish."""

from __future__ import annotations

import shlex
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ...errors import AdapterFileError, ConfigError, RankallocError
from ...trace import RankTrace
from ..config import RunConfig
from ..preemption import Preempted, Stop
from ..run_folder import SweepFolder
from ..runner import train
from .record import Sweep, best_of, choice_of
from .slots import DEATHS, DRAW, LAST, Slots, ended, queue_again, slot_of
from .space import MATCHED, PATHS, SAMPLED, configured, search_space, suggest

OnTrial = Callable[[FrozenTrial, int], None]
"""Called with a trial that has ended and how many have."""

_POLL = 0.5  # seconds between two looks for a slot, where all that are left are being trained elsewhere
_DRAWS = 8  # points drawn for a slot before one that was tried is taken again
_MOST_DEATHS = 5  # of processes that trained one trial, after which it counts as failed


def work(sweep: Sweep, slots: Slots, wanted: int, stop: Stop, on_trial: OnTrial | None = None) -> None:
    """Train slots until all ``wanted`` have a result, here or elsewhere.

    Raises:
        Preempted: ``stop`` said so; the trial in hand was put back, with a checkpoint where a step had been made.
    """
    while slots.left(wanted):
        if stop():
            raise Preempted("stopped between two trials")
        take_up(slots)
        taken = slots.take(wanted)
        if taken is None:
            time.sleep(_POLL)
            continue
        done = _one(sweep, slots, taken, stop)
        if done is not None and on_trial is not None:
            on_trial(done, sum(map(ended, slots.all().values())))


def take_up(slots: Slots, dead: tuple[int, ...] = ()) -> None:
    """Put back the trials whose process is gone; one that has ended several is told to have failed."""
    with slots.guard:
        for trial in slots.orphans(dead):
            deaths = trial.user_attrs.get(DEATHS, 0) + 1
            slots.storage.set_trial_user_attr(trial._trial_id, DEATHS, deaths)
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
    with _heartbeat(slots, taken):
        trial = optuna.trial.Trial(study, taken._trial_id)
        params = suggest(trial, search_space(sweep.config))
        twin = _tried(slots, trial, params)
        draws = trial.user_attrs.get(DRAW, 0)
        if twin is not None and draws < _DRAWS:
            study.tell(trial, state=TrialState.FAIL)
            queue_again(study, taken, {}, **{DRAW: draws + 1})
            return None
        try:
            value = _train(sweep, trial, params, stop)
        except Preempted:
            slots.put_back(taken)
            raise
        except RankallocError as error:
            trial.set_user_attr("message", str(error))
            return study.tell(trial, state=TrialState.FAIL)
        except BaseException:  # Ctrl-C, too
            slots.put_back(taken)
            raise
        return study.tell(trial, value)


@contextmanager
def _heartbeat(slots: Slots, trial: FrozenTrial) -> Iterator[None]:
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


def _train(sweep: Sweep, trial: optuna.Trial, params: dict[str, Any], stop: Stop) -> float:
    """Train one trial, or go on with it; its value is the task's metric on the tune split."""
    slot, before = slot_of(trial), time.perf_counter()
    trace = trained(sweep, run_of(sweep.config, trial.user_attrs, slot, params), slot, params, stop)
    metrics = trace.evaluations[0].metrics
    for name, value in {
        "seconds": time.perf_counter() - before, "ranks": sum(trace.final_ranks),
        "adapter_params": trace.adapter_params_final,
        "params_per_rank": min(layer.d_in + layer.d_out for layer in trace.layers), "metrics": metrics,
    }.items():
        trial.set_user_attr(name, value)
    return metrics[sweep.prepared.metric]


def trained(
    sweep: Sweep, run: RunConfig, slot: int, params: dict[str, Any], stop: Callable[[], bool] | None = None
) -> RankTrace:
    """The trace of a trial's run: as it lies in the slot's folder, continued from a checkpoint there, or trained."""
    place = sweep.folder.trial(slot)
    same = place.config.is_file() and place.config.read_text(encoding="utf-8") == run.to_yaml()
    going_on = same and (place.trace.is_file() or bool(place.checkpoints()))
    if not going_on:
        place.discard()
    command = _command(sweep.folder, run, params)
    try:
        return train(
            run, place.path, prepared=sweep.prepared, splits=("tune",), command=command, resume=going_on, stop=stop
        )
    except (AdapterFileError, ConfigError):
        if not going_on:
            raise
    place.discard()  # no checkpoint in it was whole, or they are of other code
    return train(run, place.path, prepared=sweep.prepared, splits=("tune",), command=command, stop=stop)


def run_of(config: RunConfig, attrs: dict[str, Any], slot: int, params: dict[str, Any]) -> RunConfig:
    """The configuration of a trial; a matched control has its budget in parameters."""
    run = configured(config, params).replaced({"name": f"{config.name}-{slot}"})
    if match := attrs.get("match_params"):
        others = {"budget.fraction": None, "budget.ranks": None, "budget.bytes": None}
        run = run.replaced({"budget.params": match, **others})
    return run


def sampler_of(config: RunConfig, slot: int, draw: int = 0) -> optuna.samplers.BaseSampler:
    """Seeded by the slot, so that an interrupted sweep draws what another would, and no two workers draw alike."""
    seed = (config.seed * 1_000_003 + slot + 7_919 * draw) % 2**32
    if config.sweep.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # multivariate: which rate is good depends on the method; the liar keeps workers from one point
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, multivariate=True, constant_liar=True)


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


def _command(folder: SweepFolder, run: RunConfig, params: dict[str, Any]) -> str:
    """The command that trains this one trial again."""
    values = {PATHS[name]: value for name, value in params.items()}
    if run.budget.params is not None and "budget" in params:  # a matched control
        values |= {"budget.fraction": "null", "budget.params": run.budget.params}
    sets = [word for path, value in values.items() for word in ("--set", f"{path}={value}")]
    return shlex.join(["rankalloc", "train", folder.config.as_posix(), *sets, "--output", "again"])
