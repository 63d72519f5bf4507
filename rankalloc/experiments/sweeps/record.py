"""From an Optuna study to the record of a sweep: trials, front, importances, and the pair that is
compared on the report split."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ...trace import EvaluationRecord, PairRecord, RankChoice, RankTrace, SweepRecord, TrialRecord, rank_choice
from ..config import RunConfig
from ..paired import paired_difference
from ..run_folder import SweepFolder
from ..runner import evaluate_saved
from ..tasks.base import PreparedTask
from .slots import of_slots, slot_of
from .space import SAMPLED, options_of, search_space

_Value = TypeVar("_Value")
_STATES: dict[TrialState, Literal["complete", "failed", "running", "pruned", "waiting"]] = {
    TrialState.COMPLETE: "complete", TrialState.FAIL: "failed", TrialState.RUNNING: "running",
    TrialState.PRUNED: "pruned", TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class Sweep:
    """What all trials of a sweep share. ``storage`` is named as records name it, ``command`` reproduces the sweep."""

    config: RunConfig
    folder: SweepFolder
    prepared: PreparedTask
    storage: str
    command: str | None


def sweep_record(study: optuna.Study, sweep: Sweep) -> SweepRecord:
    """The sweep so far: everything but the comparison on the report split."""
    config, prepared = sweep.config, sweep.prepared
    begun = [t for t in of_slots(study.get_trials(deepcopy=False)).values() if t.state != TrialState.WAITING]
    complete = [trial for trial in begun if trial.state == TrialState.COMPLETE]
    best = best_of(complete, study)
    trials = [trial_record(t, config, sweep.folder.path) for t in begun]
    return SweepRecord(
        name=config.name, task=prepared.name, metric=prepared.metric, direction=prepared.direction,
        space=search_space(config), storage=sweep.storage, command=sweep.command,
        config=config.model_dump(mode="json"), trials=trials, best=slot_of(best) if best else None,
        front=pareto_front(complete, prepared.direction), importances=importances(study, complete),
        seconds=sum(t.seconds or 0.0 for t in trials),
    )


def trial_record(trial: FrozenTrial, config: RunConfig, folder: Path) -> TrialRecord:
    """One trial as plain data. In a sweep with a ``placement``, its parameters include the one it ran with: a method
    without that option leaves it out."""
    attrs, params = trial.user_attrs, trial.params
    if config.method_options.get("placement", "chosen") != "chosen":
        params = {**params, "placement": options_of(config, params).get("placement", "chosen")}
    trace = SweepFolder(folder).trial(slot_of(trial)).trace
    return TrialRecord(
        number=slot_of(trial), state=_STATES[trial.state], role=attrs.get("role", SAMPLED), params=params,
        value=trial.value if trial.state == TrialState.COMPLETE else None, metrics=attrs.get("metrics", {}),
        ranks=attrs.get("ranks"), adapter_params=attrs.get("adapter_params"), seconds=attrs.get("seconds"),
        trace=trace.relative_to(folder).as_posix() if trace.is_file() else None, message=attrs.get("message"),
    )


def choice_of(trial: FrozenTrial, config: RunConfig) -> RankChoice:
    """How the trial chose its ranks; see :func:`rankalloc.trace.rank_choice`."""
    return rank_choice(trial.params["method"], options_of(config, trial.params))


def best_of(trials: list[FrozenTrial], study: optuna.Study) -> FrozenTrial | None:
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    return min(trials, key=lambda t: (sign * _known(t.value), slot_of(t)), default=None)


def pareto_front(complete: list[FrozenTrial], direction: str) -> list[int]:
    """Numbers of the trials that no other beats in both adapter parameters and value."""
    sign = -1 if direction == "maximize" else 1
    points = sorted((t.user_attrs["adapter_params"], sign * _known(t.value), slot_of(t)) for t in complete)
    front, lowest = [], float("inf")
    for _, value, number in points:
        if value < lowest:
            front.append(number)
            lowest = value
    return front


def importances(study: optuna.Study, complete: list[FrozenTrial]) -> dict[str, float]:
    """How much each parameter contributes to setting the better half of the trials apart (PED-ANOVA); shares."""
    if len(complete) < 4 or len({t.value for t in complete}) < 2:
        return {}
    # PED-ANOVA looks for what sets the low values apart: a metric to maximise is negated
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns about the sign, which is handled here
            found = optuna.importance.get_param_importances(
                study, evaluator=evaluator, target=lambda t: sign * _known(t.value)
            )
    except (ValueError, RuntimeError, ZeroDivisionError):  # every trial at one point
        return {}
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def compare_on_report(record: SweepRecord, sweep: Sweep, ensure: Callable[[int], None]) -> PairRecord | None:
    """The best adaptive trial and the best uniform one of at most its size, on the report split; ``ensure`` makes
    sure that a trial's run lies in the sweep's folder."""
    sign = -1 if record.direction == "maximize" else 1

    def best_first(trial: TrialRecord) -> tuple[float, int, int]:
        # of equally good trials the larger: a comparison at equal size wherever there is one
        return sign * _known(trial.value), -_known(trial.adapter_params), trial.number

    complete = sorted((t for t in record.trials if t.state == "complete"), key=best_first)
    adaptive = next((t for t in complete if record.rank_choice(t) == "adaptive"), None)
    if adaptive is None:
        return None
    largest = _known(adaptive.adapter_params)
    uniform = next(
        (t for t in complete if record.rank_choice(t) == "uniform" and _known(t.adapter_params) <= largest), None
    )
    if uniform is None:
        return None
    for trial in (adaptive, uniform):
        ensure(trial.number)
    first, second = (_on_report(sweep, trial.number) for trial in (adaptive, uniform))
    if first.example_losses is None or second.example_losses is None or first.examples < 2:
        return None  # one example says nothing of the next
    return PairRecord(
        adaptive=adaptive.number, uniform=uniform.number, metric=record.metric, adaptive_metrics=first.metrics,
        uniform_metrics=second.metrics, examples=first.examples,
        **paired_difference(first.example_losses, second.example_losses, sweep.config.seed),
    )


def _on_report(sweep: Sweep, number: int) -> EvaluationRecord:
    """A trial's quality on the report split; evaluated now, and kept in its trace, if it is not there yet."""
    run = sweep.folder.trial(number)
    trace = RankTrace.load(run.trace)
    evaluation = trace.evaluation("report")
    if evaluation is None:
        evaluation = evaluate_saved(sweep.config, sweep.prepared, run.adapter, "report")
        trace.evaluations.append(evaluation)
        trace.save(run.trace)
    return evaluation


def _known(value: _Value | None) -> _Value:
    """A value that every complete trial has."""
    assert value is not None
    return value
