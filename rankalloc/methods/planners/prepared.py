"""The checks that a plan needs before any data is looked at, and the way from scores to ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...budget import BudgetPlan, LayerShape, RankBudget, budget_of, share_of
from ...errors import BudgetError, ConfigError, unknown
from .. import METHODS, PLACEMENTS, Method, find_method
from ..allocators import ALLOCATORS, Demand
from . import PLANNERS, Planner


@dataclass(frozen=True)
class Prepared:
    """A plan that can be made: everything but the data has been checked."""

    method: Method
    planner: Planner | None
    placement: str
    budget: RankBudget | None
    shapes: list[LayerShape]
    given: dict[str, int] | None
    demand: Demand

    def choose(self, scores: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The ranks {name: rank} that scores {name: (peak rank,)} lead to under the method's placement."""
        names = [shape.name for shape in self.shapes]
        kept = ALLOCATORS[self.method.allocator]([scores[name] for name in names], self.demand)
        if self.placement != "chosen":
            kept = self._moved([int(mask.sum()) for mask in kept])
        return {name: int(mask.sum()) for name, mask in zip(names, kept, strict=True)}

    def _moved(self, ranks: Sequence[int]) -> list[np.ndarray]:
        """The method's own ranks under another placement: a chosen rank scores its cost, any other zero."""
        worth = [
            (np.arange(shape.rank) < rank) * float(cost)
            for shape, rank, cost in zip(self.shapes, ranks, self.demand.costs, strict=True)
        ]
        return ALLOCATORS[self.placement](worth, self.demand)

    def placed(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Ranks given by name, under the method's placement."""
        if self.placement == "chosen":
            return dict(ranks)
        kept = self._moved([ranks[shape.name] for shape in self.shapes])
        return {shape.name: int(mask.sum()) for shape, mask in zip(self.shapes, kept, strict=True)}


def prepare_plan(
    shapes: list[LayerShape],
    budget: RankBudget | None,
    method: str,
    placement: str,
    bytes_per_param: int,
    seed: int | None,
    options: dict[str, Any],
) -> Prepared:
    """Check method, placement, options and budget for layers at their peak rank.

    Raises ConfigError and BudgetError as :func:`rankalloc.plan_ranks` does.
    """
    chosen = find_method(method)
    if chosen.when != "before":
        early = [m.name for m in METHODS.values() if m.when == "before"]
        raise ConfigError(f"method {method!r} chooses ranks while training; before it, use one of: {', '.join(early)}")
    require_options(chosen, options, placement)
    if placement not in PLACEMENTS:
        raise ConfigError(unknown("placement", placement, PLACEMENTS))
    planner = PLANNERS[chosen.planner](**options) if chosen.planner is not None else None
    given = planner.given(shapes) if planner is not None else None
    if given is not None:
        asked = budget
        if budget is not None and budget.fraction:
            peak = sum(shape.rank * shape.params_per_rank for shape in shapes)
            asked = replace(budget, fraction=None, params=share_of(budget.fraction, peak))
        # a given rank may lie above the peak, which applies to the layers that no pattern names
        shapes = [replace(s, rank=max(s.rank, given[s.name])) for s in shapes]
        spent = [replace(s, rank=given[s.name]) for s in shapes]
        asked = asked or budget_of(spent, RankBudget(ranks=0))
        plan = asked.resolve(shapes, bytes_per_param=bytes_per_param)
        _require_allowed(plan, [s.rank for s in spent], shapes)
    elif budget is None:
        raise ConfigError(
            f"method {method!r} needs a budget, such as RankBudget(fraction=0.5); only 'manual' goes without one"
        )
    else:
        plan = budget.resolve(shapes, bytes_per_param=bytes_per_param)
        plan.require_spendable()
    demand = Demand.at(plan, plan.freeze_step, seed or 0)
    return Prepared(chosen, planner, placement, budget, shapes, given, demand)


def require_options(method: Method, options: Mapping[str, Any], placement: str) -> None:
    """Raise ConfigError when an option, or a placement other than its own, is not one of the method's."""
    strangers = [name for name in options if name not in method.options]
    if strangers or (placement != "chosen" and "placement" not in method.options):
        stranger = (strangers or ["placement"])[0]
        raise ConfigError(unknown(f"option of method {method.name!r}:", stranger, method.options or ["none"]))


def _require_allowed(plan: BudgetPlan, ranks: Sequence[int], shapes: Sequence[LayerShape]) -> None:
    for shape, rank, floor, cap in zip(shapes, ranks, plan.floors, plan.caps, strict=True):
        if not floor <= rank <= cap or rank % plan.multiple_of:
            raise BudgetError(
                f"rank_pattern gives {shape.name} rank {rank}, and the budget allows multiples of {plan.multiple_of} "
                f"from {floor} to {cap}"
            )
    spent = plan.spent(ranks)
    growable = [cost for cost, rank, cap in zip(plan.costs, ranks, plan.caps, strict=True) if rank < cap]
    left = plan.target - spent
    if left < 0 or (growable and left >= min(growable) * plan.multiple_of):
        raise BudgetError(
            f"rank_pattern costs {spent:,} {plan.unit} and the budget is {plan.target:,}: change the pattern, or say "
            f"{plan.unit}={spent}"
        )
