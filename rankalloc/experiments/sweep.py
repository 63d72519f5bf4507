"""An Optuna study over method, rank, alpha, budget and learning rate, with its controls.

The first trial is uniform LoRA at the start point's budget, the next the configured method at that point,
then uniform LoRA at further learning rates. The last is a *matched* control: uniform LoRA with the
parameters of the best adaptive trial so far (equal ranks are not equal parameters: layers differ in size),
at the best learning rate uniform LoRA has shown. Choices are made on the tune split; the report
split is used once, at the end, for one adaptive and one uniform trial.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ..errors import ConfigError, NothingFeasibleError, RankallocError
from ..files import write_text
from ..trace import SweepRecord, TrialRecord
from .config import RunConfig
from .run_folder import BEST_NAME, STUDY_NAME, SweepFolder
from .runner import train
from .search_space import MATCHED, PATHS, SAMPLED, Space, check_options, configured, first_points, search_space, suggest
from .sweep_record import Sweep, best_of, compare_on_report, is_adaptive, sweep_record, trial_record
from .tasks import prepare
from .tasks.base import PreparedTask

OnTrial = Callable[[TrialRecord, int, int], None]
__all__ = ["SweepSpaceError", "run_sweep", "search_space"]


class SweepSpaceError(ConfigError):
    """A sweep resumed with another search space, task or settings than it began with."""


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
        command: noted as what reproduces the sweep.
        on_trial: called after each trial with its record, the number of finished trials and the number wanted.

    Raises:
        SweepSpaceError: the study in the storage searches another space.
        NothingFeasibleError: no trial completed.
        RankallocError: the storage cannot be opened, or the data cannot be used.
    """
    wanted = trials or config.sweep.trials
    check_options(config)
    sweep = Sweep(config, SweepFolder(folder), prepare(config), _shown(storage), command)
    study = _open_study(sweep, storage, wanted)
    write_text(sweep.folder.config, config.to_yaml())

    def after(study: optuna.Study, trial: FrozenTrial) -> None:
        if on_trial is not None:
            on_trial(trial_record(trial, folder), len(_finished(study)), wanted)

    while (done := len(_finished(study))) < wanted:
        if done == wanted - 1:
            _enqueue_matched(study, search_space(config))
        study.sampler = _sampler(config, done)
        study.optimize(functools.partial(_train_trial, sweep), n_trials=1, catch=(RankallocError,), callbacks=[after])
        sweep_record(study, sweep).save(sweep.folder.record)
    return _concluded(study, sweep)


def _train_trial(sweep: Sweep, trial: optuna.Trial) -> float:
    """Train one trial; its value is the task's metric on the tune split."""
    trial.set_user_attr("owner", f"{socket.gethostname()}:{os.getpid()}")
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
        _queue_again(trial.study, params, trial.user_attrs)
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
    _copy_best(sweep.folder, final.best)
    final.save(sweep.folder.record)
    return final


def _open_study(sweep: Sweep, storage: str | None, wanted: int) -> optuna.Study:
    """The study in the storage, ready to go on, or a new one with its first points queued."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    folder, config = sweep.folder, sweep.config
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            study_name=config.name, storage=_backend(storage, folder), direction=sweep.prepared.direction,
            load_if_exists=True,
        )
    except Exception as error:  # sqlalchemy and the database drivers have exception families of their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RankallocError(f"could not open the study in {sweep.storage} of {folder.path}: {reason}") from error
    _check_same_sweep(study, config, sweep.prepared)
    _take_up_orphans(study)
    if not study.get_trials(deepcopy=False):
        for params, role in first_points(config)[: max(2, wanted - 1)]:  # the last trial is the matched control
            study.enqueue_trial(params, user_attrs={"role": role})
    return study


def _backend(storage: str | None, folder: SweepFolder) -> str | optuna.storages.JournalStorage:
    if storage and storage.startswith("journal:"):
        return optuna.storages.JournalStorage(JournalFileBackend(storage.removeprefix("journal:")))
    return storage or f"sqlite:///{folder.study.absolute()}"


def _shown(storage: str | None) -> str:
    """The storage as records name it: without a password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if storage is None or storage.startswith("journal:"):
        return storage or STUDY_NAME
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except ArgumentError:
        return "the given storage"


def _sampler(config: RunConfig, finished: int) -> optuna.samplers.BaseSampler:
    """Seeded by how many trials have finished, so that an interrupted sweep draws what another would."""
    seed = (config.seed * 1_000_003 + finished) % 2**32
    if config.sweep.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # multivariate: which rate is good depends on the method
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, multivariate=True)


def _check_same_sweep(study: optuna.Study, config: RunConfig, prepared: PreparedTask) -> None:
    now = json.loads(json.dumps(_identity(config, prepared)))
    before = study.user_attrs.get("identity")
    if before is None:
        study.set_user_attr("identity", now)
        return
    changes = list(_differences(before, now))
    if changes:
        more = f"; and {len(changes) - 4} more" if len(changes) > 4 else ""
        raise SweepSpaceError(
            f"study {study.study_name!r} was begun with other settings: {'; '.join(changes[:4])}{more}. Resume with "
            "the same ones, or give the sweep another name or output folder"
        )


def _identity(config: RunConfig, prepared: PreparedTask) -> dict[str, Any]:
    """What must not change between the trials of one sweep."""
    tree = config.model_dump(mode="json", exclude={"name", "output", "sweep", "tracking", "method"})
    if isinstance(tree["task"], dict):  # files may move; the fingerprint tells whether the data changed
        tree["task"] = {k: v for k, v in tree["task"].items() if k not in ("train", "tune", "report")}
    space = search_space(config)
    for name in space.keys() - {"method"}:
        section, key = PATHS[name].split(".")
        del tree[section][key]
    return {"search space": space, "data": prepared.fingerprint, **tree}


def _differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path} was {json.dumps(before)} and now is {json.dumps(now)}"


def _take_up_orphans(study: optuna.Study) -> None:
    """Fail the trials that a dead process of this host left running, and queue their points again."""
    host = socket.gethostname()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner, _, pid = trial.user_attrs.get("owner", f"{host}:0").rpartition(":")
        if owner != host or _alive(int(pid)):
            continue
        params = trial.system_attrs.get("fixed_params", trial.params)
        study.tell(trial.number, state=TrialState.FAIL)
        _queue_again(study, params, trial.user_attrs)


def _queue_again(study: optuna.Study, params: dict[str, Any], attrs: dict[str, Any]) -> None:
    """Queue an interrupted point as what it was: a sampled one, a control, or a control of a given size."""
    kept: dict[str, Any] = {name: attrs[name] for name in ("role", "match_params") if name in attrs}
    study.enqueue_trial(params, user_attrs={"role": SAMPLED} | kept)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid not in (0, os.getpid())


def _enqueue_matched(study: optuna.Study, space: Space) -> None:
    """Queue uniform LoRA with the best adaptive trial's parameters, unless one as large, to within one rank,
    has run."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    adaptive = best_of([t for t in complete if is_adaptive(t)], study)
    uniform = [t for t in complete if not is_adaptive(t)]
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
