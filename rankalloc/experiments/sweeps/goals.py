"""What the trials of a sweep are judged by: quality within limits, or quality against size.

The two modes are never mixed. In the first a study has one objective, limits are Optuna's constraints, and poor trials
are stopped early. In the second it has two, nothing is a limit, and no trial is stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from ..config import RunConfig
from .slots import slot_of

Direction = Literal["minimize", "maximize"]
SIZES = {"params": "adapter_params", "bytes": "stored_bytes", "step_seconds": "step_seconds"}
"""{limit: the attribute of a trial that it holds for}."""

OUT_OF_MEMORY = "memory"
"""The constraint that a trial violates which did not fit into the memory."""


def directions(config: RunConfig, direction: Direction) -> list[Direction]:
    """Optuna's directions; ``direction`` is the metric's."""
    return [direction, "minimize"] if config.sweep.goal == "pareto" else [direction]


def values(config: RunConfig, quality: float, attrs: Mapping[str, Any]) -> list[float]:
    """A trial's objectives, of its quality and its attributes."""
    return [quality, float(attrs[SIZES[config.sweep.against]])] if config.sweep.goal == "pareto" else [quality]


def constraints(config: RunConfig, attrs: Mapping[str, Any]) -> dict[str, float]:
    """{limit: by which share of it a trial exceeds it}, at most zero where it keeps it."""
    given = config.sweep.limits.given
    return {name: attrs[SIZES[name]] / limit - 1 for name, limit in given.items() if attrs.get(SIZES[name]) is not None}


def quality(trial: FrozenTrial) -> float:
    """The metric of a complete trial."""
    assert trial.values is not None
    return trial.values[0]


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial keeps every limit."""
    return all(value <= 0 for value in trial.constraints.values())


def sign_of(study: optuna.Study) -> int:
    """What qualities are multiplied by so that the lowest is the best."""
    return -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1


def ranked(trials: Iterable[FrozenTrial], study: optuna.Study) -> list[FrozenTrial]:
    """Complete trials within all limits, the best one first; of equally good ones the smaller where size is a goal,
    then the one with the lower loss (metrics that count tie easily), then the one that began first."""
    sign = sign_of(study)

    def order(trial: FrozenTrial) -> tuple[float, float, float, int]:
        size = trial.values[1] if trial.values is not None and len(trial.values) > 1 else 0.0
        return sign * quality(trial), size, trial.user_attrs.get("metrics", {}).get("loss", 0.0), slot_of(trial)

    return sorted(filter(feasible, trials), key=order)


def best_of(trials: Iterable[FrozenTrial], study: optuna.Study) -> FrozenTrial | None:
    """The first of :func:`ranked`, None for none."""
    return next(iter(ranked(trials, study)), None)


def pareto_front(trials: Iterable[FrozenTrial], study: optuna.Study, size: str = "adapter_params") -> list[int]:
    """Numbers of the trials within all limits that no other beats in both size and quality, smallest first."""
    sign = sign_of(study)
    points = sorted((t.user_attrs[size], sign * quality(t), slot_of(t)) for t in filter(feasible, trials))
    front, lowest = [], float("inf")
    for _, value, number in points:
        if value < lowest:
            front.append(number)
            lowest = value
    return front
