"""From an Optuna study to the record of a sweep: trials, front, importances, and the pair that is
compared on the report split."""

from __future__ import annotations

import csv
import io
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from ...trace import EvaluationRecord, PairRecord, RankChoice, RankTrace, SweepRecord, TrialRecord, rank_choice
from ..config import RunConfig
from ..paired import paired_difference
from ..run_folder import SweepFolder
from ..runner import evaluate_saved
from ..tasks.base import PreparedTask
from .finals import fresh_values, winner
from .goals import SIZES, pareto_front, quality, sign_of
from .slots import Slots, of_slot, slot_of
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


def sweep_record(slots: Slots, sweep: Sweep, over: bool = True) -> SweepRecord:
    """The sweep so far: everything but the comparison on the report split, and importances only when it is ``over``:
    they take longer with every trial."""
    config, prepared, study = sweep.config, sweep.prepared, slots.study
    begun = [trial for trial in slots.all().values() if trial.state != TrialState.WAITING]
    complete = [trial for trial in begun if trial.state == TrialState.COMPLETE]
    best, fresh = winner(slots, config), fresh_values(slots, config)
    trials = [
        trial_record(t, config, sweep.folder.path).model_copy(update={"fresh": fresh.get(slot_of(t), [])})
        for t in begun
    ]
    size, runs = SIZES[config.sweep.against], [*begun, *slots.again().values()]
    return SweepRecord(
        name=config.name, task=prepared.name, metric=prepared.metric, direction=prepared.direction,
        space=search_space(config), storage=sweep.storage, command=sweep.command,
        config=config.model_dump(mode="json"), trials=trials, best=slot_of(best) if best else None,
        front=pareto_front(complete, study, size), importances=importances(study, complete) if over else {},
        seconds=sum(float(run.user_attrs.get("seconds") or 0) for run in runs),
        steps=sum(int(run.user_attrs.get("steps") or 0) for run in runs),
    )


def trial_record(trial: FrozenTrial, config: RunConfig, folder: Path) -> TrialRecord:
    """One trial as plain data. In a sweep with a ``placement``, its parameters include the one it ran with: a method
    without that option leaves it out."""
    attrs, params = trial.user_attrs, trial.params
    if config.method_options.get("placement", "chosen") != "chosen":
        params = {**params, "placement": options_of(config, params).get("placement", "chosen")}
    number, seed = of_slot(slot_of(trial))
    trace = SweepFolder(folder).trial(number, seed).trace
    role, message = attrs.get("role", SAMPLED), attrs.get("message")
    if match := attrs.get("match_params"):
        message = message or f"its budget is {match:,} parameters, the best adaptive trial's"
    return TrialRecord(
        number=number, state=_STATES[trial.state], role=f"{role} {seed}" if seed else role, params=params,
        value=quality(trial) if trial.state == TrialState.COMPLETE else None, metrics=attrs.get("metrics", {}),
        values=attrs.get("values", []), over=_exceeded(trial), steps=attrs.get("steps"),
        stored_bytes=attrs.get("stored_bytes"),
        ranks=attrs.get("ranks"), adapter_params=attrs.get("adapter_params"), seconds=attrs.get("seconds"),
        trace=trace.relative_to(folder).as_posix() if trace.is_file() else None, message=message,
    )


def table_of(record: SweepRecord) -> str:
    """The trials as CSV, a row each, with a column for every dimension and metric."""
    params = list(dict.fromkeys(name for trial in record.trials for name in trial.params))
    metrics = list(dict.fromkeys(name for trial in record.trials for name in trial.metrics))
    own = ("number", "role", "state", "value", "ranks", "adapter_params", "stored_bytes", "steps", "seconds")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    marks = ("fresh_mean", "best", "front", "over", "message")
    table.writerow([*own, *params, *(f"tune_{name}" for name in metrics), *marks])
    for trial in record.trials:
        cells = [getattr(trial, name) for name in own]
        cells += [trial.params.get(name) for name in params] + [trial.metrics.get(name) for name in metrics]
        cells += [statistics.fmean(trial.fresh) if trial.fresh else None]
        cells += [int(trial.number == record.best), int(trial.number in record.front), " ".join(trial.over)]
        cells += [trial.message]
        table.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()


def _exceeded(trial: FrozenTrial) -> list[str]:
    """The limits that a trial does not keep."""
    return sorted(name for name, value in trial.constraints.items() if value > 0)


def choice_of(trial: FrozenTrial, config: RunConfig) -> RankChoice:
    """How the trial chose its ranks; see :func:`rankalloc.trace.rank_choice`."""
    return rank_choice(trial.params["method"], options_of(config, trial.params))


def importances(study: optuna.Study, complete: list[FrozenTrial]) -> dict[str, float]:
    """How much each parameter contributes to setting the better half of the trials apart (PED-ANOVA); shares."""
    if len(complete) < 4 or len({quality(t) for t in complete}) < 2:
        return {}
    # PED-ANOVA looks for what sets the low values apart: a metric to maximise is negated
    sign = sign_of(study)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns about the sign, which is handled here
            found = optuna.importance.get_param_importances(
                study, evaluator=evaluator, target=lambda t: sign * quality(t)
            )
    except (ValueError, RuntimeError, ZeroDivisionError):  # every trial at one point
        return {}
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def compare_on_report(record: SweepRecord, sweep: Sweep, ensure: Callable[[int], None]) -> PairRecord | None:
    """The best adaptive trial and the best uniform one of at most its size, on the report split; ``ensure`` makes
    sure that a trial's run lies in the sweep's folder."""
    sign = -1 if record.direction == "maximize" else 1

    def best_first(trial: TrialRecord) -> tuple[bool, float, float, int, int]:
        # the winner stands for its kind; metrics that count tie easily, so the loss decides next; of equally good
        # trials the larger: a comparison at equal size wherever there is one
        loss, size = trial.metrics.get("loss", 0.0), _known(trial.adapter_params)
        return trial.number != record.best, sign * _known(trial.value), loss, -size, trial.number

    complete = sorted((t for t in record.trials if t.state == "complete" and not t.over), key=best_first)
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
