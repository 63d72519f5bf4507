"""What a sweep would do, before it does anything: what a dry run shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..config import RunConfig
from ..tasks import metric_of
from .pruning import rungs_of
from .sharing import column_of
from .space import MATCHED, SAMPLED, check_space, first_points, search_space


@dataclass(frozen=True)
class SweepPlan:
    """``first`` has the trials by role, in the order of their beginning; ``rungs`` the steps after which a poor one is
    stopped; ``column`` the budgets that a shared run is cut to; ``steps`` the most that all runs can take. ``against``
    is None unless the front is looked for."""

    metric: str
    against: str | None
    limits: dict[str, float]
    first: dict[str, int]
    rungs: list[int]
    column: list[float]
    finalists: int
    fresh_seeds: int
    steps: int


def plan_of(config: RunConfig, trials: int | None, total_steps: int) -> SweepPlan:
    """The course of a sweep whose runs take ``total_steps``.

    Raises:
        ConfigError: the space has a dimension that no run has, or a column that is none.
    """
    check_space(config)
    column, sweep, wanted = column_of(config), config.sweep, trials or config.sweep.trials
    roles = Counter(role for _, role in first_points(config)[: max(2, wanted - 1)])
    rest = wanted - sum(roles.values())
    roles[SAMPLED] = max(0, rest - 1)
    roles[MATCHED] = int(rest > 0 and "uniform" in search_space(config)["method"]["choices"])
    pareto = sweep.goal == "pareto"
    finalists = 1 if pareto else min(sweep.finalists, wanted)
    runs = wanted * sweep.seeds + (finalists * sweep.fresh_seeds if finalists > 1 else 0) + max(0, len(column) - 1)
    return SweepPlan(
        metric=metric_of(config).metric, against=sweep.against if pareto else None, limits=sweep.limits.given,
        first={_said(role): amount for role, amount in roles.items() if amount}, rungs=rungs_of(config, total_steps),
        column=column, finalists=finalists, fresh_seeds=sweep.fresh_seeds, steps=runs * total_steps,
    )  # fmt: skip


def _said(role: str) -> str:
    return f"{role} (unless a uniform trial has that size)" if role == MATCHED else role
