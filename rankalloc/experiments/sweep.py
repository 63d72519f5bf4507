"""An Optuna study over method, rank, alpha, budget and learning rate, with its controls.

The first trial is uniform LoRA at the start point's budget, the next the configured method at that point,
then uniform LoRA at further learning rates. The last is a *matched* control: uniform LoRA with the
parameters of the best adaptive trial so far (equal ranks are not equal parameters: layers differ in size),
at the best learning rate uniform LoRA has shown. Choices are made on the tune split; the report
split is used once, at the end, for one adaptive and one uniform trial.
"""

from __future__ import annotations

import functools
import shlex
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..errors import NothingFeasibleError, RankallocError
from ..files import write_text
from ..trace import SweepRecord, TrialRecord
from . import study_storages
from .config import RunConfig
from .run_folder import BEST_NAME, RunFolder, SweepFolder
from .runner import train
from .search_space import MATCHED, PATHS, Space, check_options, configured, search_space, suggest
from .study import SweepSpaceError, open_study, owner, queue_again
from .sweep_record import Sweep, best_of, choice_of, compare_on_report, sweep_record, trial_record
from .tasks import prepare

OnTrial = Callable[[TrialRecord, int, int], None]
__all__ = ["SweepSpaceError", "run_sweep"]


def run_sweep(
    config: RunConfig,
    folder: Path,
    *,
    trials: int | None = None,
    storage: str | None = None,
    command: str | None = None,
    on_trial: OnTrial | None = None,
) -> SweepRecord:
    """Run trials until ``trials`` of them have finished, and write ``folder``/sweep.json.

    An existing study is resumed; an interrupted sweep ends exactly like an uninterrupted one. Points of trials that
    a killed process left running are tried again.

    Args:
        trials: number of finished trials, earlier ones included; None for ``sweep.trials``.
        storage: Optuna storage URL, or ``journal:PATH`` for a journal file; None for SQLite in ``folder``.
        command: recorded as the command that reproduces the sweep.
        on_trial: called after each trial with its record, the number of finished trials and the number wanted.

    Raises:
        SweepSpaceError: the study in the storage searches another space.
        NothingFeasibleError: no trial completed.
        RankallocError: the storage cannot be opened, or the data cannot be used.
    """
    wanted = trials or config.sweep.trials
    check_options(config)
    sweep = Sweep(config, SweepFolder(folder), prepare(config), study_storages.shown(storage), command)
    study = open_study(sweep, storage, wanted)
    if not sweep.folder.config.is_file() or sweep.folder.config.read_text(encoding="utf-8") != config.to_yaml():
        write_text(sweep.folder.config, config.to_yaml())

    def after(study: optuna.Study, trial: FrozenTrial) -> None:
        if on_trial is not None:
            on_trial(trial_record(trial, config, folder), len(_finished(study)), wanted)

    while (done := len(_finished(study))) < wanted:
        if done == wanted - 1:
            _enqueue_matched(study, config, search_space(config))
        study.sampler = _sampler(config, done)
        study.optimize(functools.partial(_train_trial, sweep), n_trials=1, catch=(RankallocError,), callbacks=[after])
        sweep_record(study, sweep).save(sweep.folder.record)
    return _concluded(study, sweep)


def _train_trial(sweep: Sweep, trial: optuna.Trial) -> float:
    """Train one trial; its value is the task's metric on the tune split."""
    trial.set_user_attr("owner", owner())
    params = suggest(trial, search_space(sweep.config))
    run = _run_of(sweep.config, trial, params)
    before = time.perf_counter()
    try:
        trace = train(
            run, sweep.folder.trial(trial.number).path, prepared=sweep.prepared, splits=("tune",),
            command=_trial_command(sweep.folder, run, params),
        )
    except RankallocError as error:
        trial.set_user_attr("message", str(error))
        raise
    except KeyboardInterrupt:
        queue_again(trial.study, params, trial.user_attrs)
        raise
    metrics = trace.evaluations[-1].metrics
    trial.set_user_attr("seconds", time.perf_counter() - before)
    trial.set_user_attr("ranks", sum(trace.final_ranks))
    trial.set_user_attr("adapter_params", trace.adapter_params_final)
    trial.set_user_attr("params_per_rank", min(layer.d_in + layer.d_out for layer in trace.layers))
    trial.set_user_attr("metrics", metrics)
    return metrics[sweep.prepared.metric]


def _run_of(config: RunConfig, trial: optuna.Trial, params: dict[str, Any]) -> RunConfig:
    """The configuration of a trial; a matched control has its budget in parameters."""
    run = configured(config, params).replaced({"name": f"{config.name}-{trial.number}"})
    if match := trial.user_attrs.get("match_params"):
        others = {"budget.fraction": None, "budget.ranks": None, "budget.bytes": None}
        run = run.replaced({"budget.params": match, **others})
    return run


def _concluded(study: optuna.Study, sweep: Sweep) -> SweepRecord:
    """Compare the best pair on the report split, and write best/ and the final record."""
    final = sweep_record(study, sweep)
    if final.best is None:
        reasons = sorted({trial.message for trial in final.trials if trial.message})
        raise NothingFeasibleError(f"none of {len(final.trials)} trials completed: {'; '.join(reasons)}")
    final.pair = compare_on_report(final, sweep)
    if (earlier := _concluded_before(final, sweep.folder)) is not None:
        return earlier
    _copy_best(sweep.folder, final.best)
    final.save(sweep.folder.record)
    return final


def _concluded_before(final: SweepRecord, folder: SweepFolder) -> SweepRecord | None:
    """The record of the sweep when it had ended exactly so before; None when it had not."""
    if not folder.record.is_file() or not RunFolder(folder.best).trace.is_file():
        return None
    earlier = SweepRecord.load(folder.record)
    return earlier if final.model_copy(update={"created": earlier.created}) == earlier else None


def _sampler(config: RunConfig, finished: int) -> optuna.samplers.BaseSampler:
    """Seeded by how many trials have finished, so that an interrupted sweep draws what another would."""
    seed = (config.seed * 1_000_003 + finished) % 2**32
    if config.sweep.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # multivariate: which rate is good depends on the method
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, multivariate=True)


def _enqueue_matched(study: optuna.Study, config: RunConfig, space: Space) -> None:
    """Queue uniform LoRA with the best adaptive trial's parameters, unless one as large, to within one rank,
    has run."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    adaptive = best_of([t for t in complete if choice_of(t, config) == "adaptive"], study)
    uniform = [t for t in complete if choice_of(t, config) == "uniform"]
    if adaptive is None or "uniform" not in space["method"]["choices"]:
        return
    size = adaptive.user_attrs["adapter_params"]
    cheapest = adaptive.user_attrs["params_per_rank"]
    if any(size - cheapest < t.user_attrs["adapter_params"] <= size for t in uniform):
        return
    rate = (best_of(uniform, study) or adaptive).params["learning_rate"]
    params = {**adaptive.params, "method": "uniform", "learning_rate": rate}
    study.enqueue_trial(params, user_attrs={"role": MATCHED, "match_params": size})


def _trial_command(folder: SweepFolder, run: RunConfig, params: dict[str, Any]) -> str:
    """The command that trains this one trial again."""
    values = {PATHS[name]: value for name, value in params.items()}
    if run.budget.params is not None and "budget" in params:  # a matched control
        values |= {"budget.fraction": "null", "budget.params": run.budget.params}
    sets = [word for path, value in values.items() for word in ("--set", f"{path}={value}")]
    return shlex.join(["rankalloc", "train", folder.config.as_posix(), *sets, "--output", "again"])


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count: complete ones, and those that failed by themselves."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
    return [t for t in ended if t.state == TrialState.COMPLETE or "message" in t.user_attrs]


def _copy_best(folder: SweepFolder, number: int) -> None:
    """Make best/ a copy of the best trial's folder."""
    fresh = folder.path / f".{BEST_NAME}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(folder.trial(number).path, fresh)
    shutil.rmtree(folder.best, ignore_errors=True)
    fresh.rename(folder.best)
