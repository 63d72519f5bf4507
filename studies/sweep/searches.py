"""Three searches of one space, each as a list of trials in order: values, sizes and the steps spent until then."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import torch
import transformers

from rankalloc.experiments.config import RunConfig
from rankalloc.experiments.kept_base import with_kept_base
from rankalloc.experiments.run_folder import SweepFolder
from rankalloc.experiments.runner import evaluate_saved
from rankalloc.experiments.sweeps.record import Sweep
from rankalloc.experiments.sweeps.space import configured, search_space, suggest
from rankalloc.experiments.sweeps.study import join_study
from rankalloc.experiments.sweeps.sweep import run_sweep
from rankalloc.experiments.sweeps.trial_runs import trained
from rankalloc.experiments.tasks import prepare

from ..common.training import SHORT_PUNCTUATION

TRIALS = 24
"""Trials of each search. The sweep stops some of them early, which pays for the six runs it spends on fresh seeds."""
TUNE = 600
"""Windows of the tune split. With a third of them, the luck of the best of 24 trials is larger than what tells good
points from very good ones."""
_MIDDLES = {"thirds": (1 / 6, 3 / 6, 5 / 6), "halves": (1 / 4, 3 / 4)}
GRID = {
    "method": ["auto", "uniform"],
    "learning_rate": [1e-3 * 20**share for share in _MIDDLES["thirds"]],
    "alpha": [4 * 32**share for share in _MIDDLES["halves"]],
    "budget": [0.25 + 0.75 * share for share in _MIDDLES["halves"]],
}
"""A grid of as many trials: the middles of equal parts of each dimension, on a log scale where the sweep has one."""
GRID_RANK = 8


class Cell(NamedTuple):
    """One search with one seed, which decides its draws and the seed of every run."""

    search: str
    seed: int
    steps: int
    trials: int
    work: Path


def config_of(cell: Cell) -> RunConfig:
    """The sweep's configuration: everything that is not named here is rankalloc's default."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    return RunConfig().replaced({
        "name": f"{cell.search}-{cell.seed}", "data": {**SHORT_PUNCTUATION, "limit_tune": TUNE},
        "training.steps": cell.steps, "budget.fraction": 0.5, "sweep.trials": cell.trials, "seed": 100 * cell.seed,
    })  # fmt: skip


def search(cell: Cell) -> dict[str, Any]:
    """Run a search: its trials in the order in which they ended, what it spent, and its winner's report score."""
    config, folder = config_of(cell), cell.work / f"{cell.search}-{cell.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    if cell.search == "sweep":
        return _swept(config, folder)
    prepared = with_kept_base(prepare(config), config.adapter.modules_to_save)
    sweep = Sweep(config, SweepFolder(folder), prepared, "none", None)
    trials: list[dict[str, Any]] = []
    for number, params in enumerate(_points(cell, config)):
        run = configured(config, params)
        trace = trained(sweep, run, sweep.folder.trial(number), params)
        metrics = trace.evaluations[0].metrics
        trials.append({"params": params, "value": metrics[prepared.metric], "steps": trace.steps_done})
    best = max(range(len(trials)), key=lambda number: (trials[number]["value"], -number))
    report = evaluate_saved(config, prepared, sweep.folder.trial(best).adapter, "report")
    return _outcome(trials, best, report.metrics)


def _points(cell: Cell, config: RunConfig) -> Iterable[dict[str, Any]]:
    if cell.search == "grid":
        points = itertools.product(*GRID.values())
        for values in itertools.islice(points, cell.trials):
            yield {"rank": GRID_RANK, **dict(zip(GRID, values, strict=True))}
        return
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=cell.seed))
    for _ in range(cell.trials):
        yield suggest(study.ask(), search_space(config))


def _swept(config: RunConfig, folder: Path) -> dict[str, Any]:
    record = run_sweep(config, folder)
    slots, _, _ = join_study(f"sqlite:///{SweepFolder(folder).study.absolute()}", None)
    ended = sorted(
        (trial for trial in {**slots.all(), **slots.again()}.values()), key=lambda trial: str(trial.datetime_complete)
    )
    again = {id(trial) for trial in slots.again().values()}
    trials = [
        {
            "params": trial.params, "value": trial.value if trial.state.name == "COMPLETE" else None,
            "steps": trial.user_attrs["steps"], "state": trial.state.name.lower(),
            "role": trial.user_attrs["role"], "again": id(trial) in again,
        }
        for trial in ended
    ]  # fmt: skip
    best = record.trial(record.best or 0)
    prepared = prepare(config)
    report = evaluate_saved(config, prepared, SweepFolder(folder).trial(best.number).adapter, "report")
    number = next(i for i, trial in enumerate(trials) if trial["params"] == best.params and not trial["again"])
    return {**_outcome(trials, number, report.metrics), "fresh": best.fresh}


def _outcome(trials: list[dict[str, Any]], best: int, report: dict[str, float]) -> dict[str, Any]:
    return {"trials": trials, "best": best, "report": report, "steps": sum(trial["steps"] for trial in trials)}

