"""Stopping poor trials early: Optuna's pruners decide, on evaluations at a quarter and at half of the steps.

An adaptive method still holds its peak ranks while a schedule cuts others' to the budget, so losses at one step do not
compare across methods. All trials of a sweep have one length and one schedule; a trial is compared, at the same step,
with trials of its own method only.

Trials that are there for comparison (the controls, the start, earlier bests) are evaluated likewise, so that others are
compared with them, and are never stopped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner, WilcoxonPruner
from optuna.trial import FrozenTrial, TrialState
from transformers import TrainerCallback

from ...trace import EvaluationRecord
from ..config import RunConfig
from ..runner import steps_of
from ..tasks.base import PreparedTask, evaluate
from .goals import best_of
from .space import SAMPLED

_FACTOR = 2  # the better half of the trials that came so far goes on
_FEWEST = 3  # trials of its method that must have come so far before one is stopped
_BLOCKS = 24  # of examples, whose mean losses are paired
_SURE = 0.1  # p value
_SHORTEST = 20  # steps below which a run is too short to be judged in the middle


def rungs(config: RunConfig, prepared: PreparedTask) -> list[int]:
    """The steps after which a trial is evaluated: a quarter and a half of all; none where nothing is to be pruned."""
    return rungs_of(config, steps_of(config, prepared.train_examples or 0))


def rungs_of(config: RunConfig, total: int) -> list[int]:
    """The same for a run of ``total`` steps."""
    sweep = config.sweep
    if sweep.pruner == "none" or sweep.goal != "quality" or sweep.processes > 1 or total < _SHORTEST:
        return []
    quarter = math.ceil(total / 4)
    return [quarter, _FACTOR * quarter]


def pruner_of(config: RunConfig, prepared: PreparedTask) -> BasePruner:
    """The pruner of a sweep, which looks at trials of one method only."""
    found = rungs(config, prepared)
    if not found:
        return NopPruner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return WithinMethod(PRUNERS[config.sweep.pruner](found[0]))


PRUNERS: dict[str, Callable[[int], BasePruner]] = {
    "halving": lambda first: SuccessiveHalvingPruner(
        min_resource=first, reduction_factor=_FACTOR, bootstrap_count=0
    ),
    "wilcoxon": lambda first: WilcoxonPruner(p_threshold=_SURE, n_startup_steps=_BLOCKS // 3),
}
"""{name in ``sweep.pruner``: Optuna's pruner, of the step of the first rung}."""


class WithinMethod(BasePruner):
    """A pruner that sees the trials of the trial's own method, once there are some, and spares what was enqueued."""

    def __init__(self, pruner: BasePruner) -> None:
        self.pruner = pruner

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        alike: Any = _OfOneMethod(study, trial)
        if not self.pruner.prune(alike, trial):
            return False
        others = [one for one in alike.get_trials(deepcopy=False) if one.number != trial.number]
        come_so_far = [one for one in others if one.last_step is not None and one.last_step >= (trial.last_step or 0)]
        return trial.user_attrs.get("role", SAMPLED) == SAMPLED and len(come_so_far) >= _FEWEST


class _OfOneMethod:
    """A study as a pruner sees it, with the trials of one method."""

    def __init__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._own, self._method = study, trial.params.get("method")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def get_trials(self, deepcopy: bool = True, states: Sequence[TrialState] | None = None) -> list[FrozenTrial]:
        """Those of the method."""
        found = self._own.get_trials(deepcopy=deepcopy, states=states)
        return [trial for trial in found if trial.params.get("method") == self._method]

    @property
    def trials(self) -> list[FrozenTrial]:
        """Those of the method."""
        return self.get_trials()

    @property
    def best_trial(self) -> FrozenTrial:
        """The best complete one; ValueError for none, as a study has it."""
        best = best_of(self.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)), self._own)
        if best is None:
            raise ValueError("no trial of this method is complete")
        return best


class Rungs(TrainerCallback):
    """Evaluates a trial at every rung, tells its study, and raises TrialPruned where the study's pruner says so."""

    def __init__(self, config: RunConfig, prepared: PreparedTask, trial: optuna.Trial) -> None:
        self.config, self.prepared, self.trial = config, prepared, trial
        self.at = rungs(config, prepared)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step not in self.at or state.global_step >= state.max_steps:
            return
        record = evaluate(self.prepared, model, "tune", self.config.training.eval_batch_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a trial that goes on may come to a rung again
            for step, value in self._told(record, state.global_step):
                self.trial.report(value, step)
        if self.trial.should_prune():
            self.trial.set_user_attr("steps", state.global_step)
            raise optuna.TrialPruned(f"stopped after step {state.global_step} of {state.max_steps}")

    def _told(self, record: EvaluationRecord, step: int) -> list[tuple[int, float]]:
        """(step, value) as the pruner takes them: the metric at this step, or the mean losses of blocks of examples,
        which stand in the place of steps."""
        if self.config.sweep.pruner != "wilcoxon" or record.example_losses is None:
            return [(step, record.metrics[self.prepared.metric])]
        sign = 1 if self.prepared.direction == "minimize" else -1
        blocks = np.array_split(np.asarray(record.example_losses), min(_BLOCKS, len(record.example_losses)))
        first = self.at.index(step) * _BLOCKS
        return [(first + place, sign * float(block.mean())) for place, block in enumerate(blocks)]
