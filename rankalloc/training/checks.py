"""Do method, budget and adapters fit together? Asked before a run begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..adapters.adapter_set import Adapters
from ..budget import BudgetPlan, RankBudget, budget_of
from ..errors import BudgetError, NotAdaptedError
from ..methods import Method


def check_spendable(plan: BudgetPlan, adapters: Adapters) -> None:
    """A budget must buy a rank, and adapters that an earlier run shrank cannot spend more than they hold.

    Raises:
        BudgetError: neither holds.
    """
    plan.require_spendable()
    unspent = plan.target - plan.spent([a.rank for a in adapters])
    growable = [c for c, a, cap in zip(plan.costs, adapters, plan.caps, strict=True) if a.rank < cap]
    if growable and unspent >= min(growable) * plan.multiple_of:
        raise BudgetError(
            f"the budget of {plan.target:,} {plan.unit} is {unspent:,} above what these adapters still hold after "
            "ranks were removed; lower it, or attach anew"
        )


def hasty(plan: BudgetPlan, method: Method) -> list[str]:
    """An alert for a run that is too short to choose: its ranks are cut at one stroke."""
    steps = [step for step in range(1, plan.freeze_step + 1) if plan.allocates(step)]
    if len(steps) > 1 or plan.initial <= plan.target or method.score is None or method.rule != "shrink":
        return []
    return [
        f"the run is short: all ranks are cut at once at step {plan.freeze_step} of {plan.total_steps}, by what those "
        f"few steps showed; train longer, or allocate more often than every {plan.every} steps (budget.every, or "
        "RankBudget(every=...))"
    ]


def never_reached(idle: Sequence[str], adapters: Adapters, chosen: bool) -> list[str]:
    """An alert that names the layers which never got a gradient.

    Args:
        idle: their names.
        chosen: whether ranks were chosen while training, so that these layers got none.
    """
    if not idle:
        return []
    named = ", ".join(idle[:3]) + (f" and {len(idle) - 3} more" if len(idle) > 3 else "")
    what = "so they got no ranks" if chosen else "so their ranks are of no use"
    return [
        f"{len(idle)} of {len(adapters)} adapted layers never got a gradient ({named}): nothing in the training data "
        f"reaches them, or the model never calls them, {what}; leave them out with exclude_modules"
    ]


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether every number is finite: one synchronisation, and as many operators as dtypes and devices."""
    alike: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    norms = [
        # in half precision the norm of finite numbers may be too large a number
        torch.stack(torch._foreach_norm(some, 2, torch.float32 if some[0].itemsize < 4 else None)).float().sum()
        for some in alike.values()
    ]
    return bool(torch.isfinite(torch.stack([norm.to(norms[0].device) for norm in norms])).all())


def budget_of_units(adapters: Adapters, budget: RankBudget) -> RankBudget:
    """``budget`` as a controller holds it over bottlenecks: restated as the units they have, whose biases no unit of a
    budget counts.

    Raises:
        BudgetError: they are larger than the budget, or were not planned for it.
    """
    units, size = sum(a.initial_rank for a in adapters), adapters.num_params()
    planned = adapters.plan.budget if adapters.plan is not None else None
    if budget.params is not None:
        fits = size <= budget.params
    elif budget.bytes is not None:
        fits = size * adapters.bytes_per_param() <= budget.bytes
    else:
        fits = budget.ranks == units or planned is not None and planned.given == budget.given
    if not fits:
        said = ", ".join(f"{name}={value:,}" for name, value in budget.given.items())
        raise BudgetError(
            f"these bottlenecks hold {units:,} units with {size:,} parameters, and the budget says {said}: attach with "
            "ranks=rankalloc.plan_ranks(model, None, budget, 'bottleneck'), which sizes them for it"
        )
    return RankBudget(ranks=units, warmup=budget.warmup, freeze=budget.freeze, every=budget.every, shape=budget.shape)


def budget_after(adapters: Adapters, budget: RankBudget, method: Method) -> RankBudget:
    """``budget`` as a controller holds it over adapters whose ranks ``method`` has chosen already: restated as
    what they hold.

    Raises:
        NotAdaptedError: no plan was made for these adapters.
        BudgetError: it was made for another budget.
    """
    if adapters.plan is None:
        raise NotAdaptedError(
            f"method {method.name!r} chooses ranks before training, and these adapters begin with no plan: attach with "
            f"ranks=rankalloc.plan_ranks(model, batches, budget, {method.name!r}), or give the Trainer a RankCallback, "
            "which plans from its training data"
        )
    shapes = [replace(s, rank=a.initial_rank) for s, a in zip(adapters.shapes(), adapters, strict=True)]
    held = budget_of(shapes, budget, adapters.bytes_per_param())
    planned = adapters.plan.budget
    if planned is not None and budget.given != planned.given and budget.given != held.given:
        (unit, spent), = held.given.items()
        said = ", ".join(f"{name}={value:,}" for name, value in budget.given.items())
        raise BudgetError(
            f"the budget says {said}, and the plan these adapters began with spends {spent:,} {unit} of "
            f"{planned.given}: plan for the same budget"
        )
    return held
