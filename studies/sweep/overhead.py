"""What a trial of a sweep spends its time on: training steps, evaluation, and everything else."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback

from rankalloc.experiments import runner
from rankalloc.experiments.config import RunConfig
from rankalloc.experiments.sweeps import pruning, trial_runs
from rankalloc.experiments.sweeps.sweep import run_sweep


class Clock(TrainerCallback):
    """The seconds of the training loop."""

    def __init__(self) -> None:
        self.training = 0.0
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training += time.perf_counter() - self._since


def shares(folder: Path, quick: bool = False) -> list[dict[str, float]]:
    """Run a sweep of the default task in one process: per trial, from the end of the one before (from the first
    claim for the first), its seconds in all, in training, in evaluation, and the rest."""
    transformers.logging.set_verbosity_error()
    shutil.rmtree(folder, ignore_errors=True)
    config = RunConfig().replaced({
        "name": "overhead", "sweep.trials": 3 if quick else 4, "sweep.finalists": 1,
        "training.steps": 20 if quick else RunConfig().training.steps,
    })  # fmt: skip
    clock, evaluated, found = Clock(), [0.0], []
    train, since = runner.train, [time.perf_counter(), 0.0, 0.0]

    def timed(call: Any) -> Any:
        def judged(*args: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args, **named)
            finally:
                evaluated[0] += time.perf_counter() - begun

        return judged

    def ended(*_: Any) -> None:
        now = time.perf_counter()
        seconds, training, evaluation = now - since[0], clock.training - since[1], evaluated[0] - since[2]
        found.append({
            "seconds": seconds, "training": training, "evaluation": evaluation,
            "rest": seconds - training - evaluation,
        })  # fmt: skip
        since[:] = [now, clock.training, evaluated[0]]

    kept = trial_runs.train, runner.evaluate, pruning.evaluate
    trial_runs.train = lambda *args, callbacks=(), **named: train(*args, callbacks=(*callbacks, clock), **named)  # type: ignore[assignment]
    runner.evaluate = timed(runner.evaluate)
    try:
        run_sweep(config.replaced({"sweep.pruner": "none"}), folder, on_trial=ended)
    finally:
        trial_runs.train, runner.evaluate, pruning.evaluate = kept
    return found
