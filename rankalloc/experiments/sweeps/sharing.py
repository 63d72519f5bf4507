"""One run that answers a whole column of budgets (``sweep.share_runs``).

Every trial is trained at the largest budget only. Its adapter is then cut to each smaller one, without further
training, and evaluated on the tune split; the trial's value is the mean over the column. That is an approximation: a
run that was given the smaller budget from the start could adapt to it. So, at the end, the best trial of each budget is
trained directly at that budget, and both values are reported.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from ...budget import RankBudget
from ...errors import ConfigError
from ...posthoc.frontier import frontier
from ...trace import ColumnRecord, RankTrace
from ..config import RunConfig
from ..judging import TaskEvaluator
from ..run_folder import RunFolder
from ..sweep_section import FloatRange
from .goals import feasible, sign_of
from .record import Sweep
from .slots import Slots, slot_of
from .trial_runs import run_of, trained

_POINTS = 4  # budgets of a column that is given as a range

COLUMN = "column"
"""The attribute of a trial that holds its value at each budget but the largest, [budget, value]."""


def column_of(config: RunConfig) -> list[float]:
    """The budgets that every run answers, as shares, smallest first; [] where runs are not shared.

    Raises:
        ConfigError: there is no column, or the sweep looks for a front, whose sizes it would mix up.
    """
    if not config.sweep.share_runs:
        return []
    given = config.sweep.search.budget
    if config.budget.fraction is None or not isinstance(given, (list, FloatRange)):
        raise ConfigError("sweep.share_runs needs several budgets: list shares in sweep.search.budget, or give a range")
    if config.sweep.goal != "quality":
        raise ConfigError("sweep.share_runs is for goal quality; goal pareto has a budget in every trial")
    if isinstance(given, FloatRange):
        step = (given.high / given.low) ** (1 / (_POINTS - 1))
        given = [given.low * step**power for power in range(_POINTS - 1)] + [given.high]
    shares = sorted(set(given))
    if len(shares) < 2:
        raise ConfigError(f"sweep.share_runs needs several budgets, and sweep.search.budget has one: {shares[0]:g}")
    return shares


def measured(sweep: Sweep, place: RunFolder, trace: RankTrace) -> list[list[float]]:
    """The value of a run's adapter cut to each budget of the column but the one that it was trained at."""
    shares = column_of(sweep.config)[:-1]
    whole = sum((layer.d_in + layer.d_out) * trace.rank for layer in trace.layers)
    judge = TaskEvaluator(sweep.prepared, "tune", sweep.config.training.eval_batch_size)
    budgets = [RankBudget(params=max(1, math.floor(share * whole))) for share in shares]
    curve = frontier(place.adapter, budgets, judge, higher_is_better=judge.higher_is_better)
    # by rising parameters, as the shares are; the whole adapter comes last
    return [[share, point.value] for share, point in zip(shares, curve.points[:-1], strict=True)]


def answers(slots: Slots, sweep: Sweep) -> list[ColumnRecord]:
    """The best trial of every budget, with its value cut from the shared run and trained directly."""
    shares = column_of(sweep.config)
    complete = [t for t in slots.all().values() if t.state == TrialState.COMPLETE and feasible(t)]
    found = []
    for share in shares:
        held = [(value, trial) for trial in complete if (value := _value_at(trial, share, shares[-1])) is not None]
        if not held:
            continue
        value, best = min(held, key=lambda pair: (sign_of(slots.study) * pair[0], slot_of(pair[1])))
        slot, params = slot_of(best), {**best.params, "budget": share}
        direct, size, steps = value, best.user_attrs["adapter_params"], 0
        if share != shares[-1]:
            run = run_of(sweep.config, {}, slot, params)
            place = sweep.folder.trial_at(slot, share)
            trace = trained(sweep, run.replaced({"name": place.path.name}), place, params)
            direct, size = trace.evaluations[0].metrics[sweep.prepared.metric], trace.adapter_params_final or 0
            steps = trace.steps_done
        found.append(
            ColumnRecord(budget=share, trial=slot, shared=value, direct=direct, adapter_params=size, steps=steps)
        )
    return found


def mean_over(own: float, column: list[list[float]]) -> float:
    """The value of a trial: of its own budget and of those that its run was cut to."""
    return statistics.fmean([own, *(value for _, value in column)]) if column else own


def _value_at(trial: FrozenTrial, share: float, largest: float) -> float | None:
    attrs: dict[str, Any] = trial.user_attrs
    if COLUMN not in attrs:
        return None
    if share == largest:
        return statistics.fmean(attrs["values"])
    return next((value for at, value in attrs[COLUMN] if at == share), None)
