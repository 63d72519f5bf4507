"""Naming the winner: the best trials are trained again with seeds that nobody chose by.

The best of many trials owes part of its value to luck (the winner's curse), so the value that it was chosen by says too
much of it. A few candidates are trained again with fresh seeds, and the one with the best mean over those wins.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from ...trace import FRESH_SEED
from ..config import RunConfig
from .goals import quality, ranked, sign_of
from .slots import Slots, slot_of, with_seed


def finalists(slots: Slots, config: RunConfig) -> list[FrozenTrial]:
    """The trials that the winner is chosen from, the best first."""
    complete = [trial for trial in slots.all().values() if trial.state == TrialState.COMPLETE]
    return ranked(complete, slots.study)[: config.sweep.finalists]


def left(slots: Slots, config: RunConfig, wanted: int) -> int:
    """How many runs are still to be made: trials, or, when all have ended, the finalists' fresh seeds, which are queued
    by whoever comes here first."""
    trials = slots.left(wanted)
    if trials or config.sweep.goal != "quality":
        return trials
    candidates = finalists(slots, config)
    if len(candidates) < 2:
        return 0
    return slots.ensure({
        with_seed(slot_of(trial), seed): (trial.params, {"role": FRESH_SEED, **_own(trial)})
        for trial in candidates for seed in fresh_seeds(config)
    })  # fmt: skip


def _own(trial: FrozenTrial) -> dict[str, Any]:
    """What a matched control is made from besides its parameters."""
    return {name: trial.user_attrs[name] for name in ("match_params",) if name in trial.user_attrs}


def fresh_seeds(config: RunConfig) -> range:
    """Numbers of the further seeds that the finalists are trained with; those before are each trial's own."""
    return range(config.sweep.seeds, config.sweep.seeds + config.sweep.fresh_seeds)


def fresh_values(slots: Slots, config: RunConfig) -> Mapping[int, list[float]]:
    """{slot of a trial: its values at fresh seeds}, of the trials all of whose fresh runs have ended well."""
    done, found = slots.again(), {}
    for slot in slots.all():
        runs = [done.get(with_seed(slot, seed)) for seed in fresh_seeds(config)]
        if all(run is not None and run.state == TrialState.COMPLETE for run in runs):
            found[slot] = [quality(run) for run in runs if run is not None]
    return found


def winner(slots: Slots, config: RunConfig) -> FrozenTrial | None:
    """The finalist with the best mean over its fresh seeds; the best trial while there is no such mean."""
    candidates, fresh, sign = finalists(slots, config), fresh_values(slots, config), sign_of(slots.study)
    tested = [trial for trial in candidates if slot_of(trial) in fresh]
    if not tested:
        return candidates[0] if candidates else None
    return min(tested, key=lambda trial: sign * statistics.fmean(fresh[slot_of(trial)]))
