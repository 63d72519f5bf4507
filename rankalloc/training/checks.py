"""Do method, budget and adapters fit together? Asked before a run begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..adapters.adapter import FIXED_Q
from ..adapters.adapter_set import Adapters
from ..adapters.plan import budget_of
from ..budget import BudgetPlan, RankBudget
from ..errors import BudgetError, ConfigError, NotAdaptedError
from ..methods import METHODS, Method
from ..methods.planners import PLANNERS, Planner
from ..methods.scores import SCORES
from ..options import flag, number


def check_init(method: Method, init: str) -> None:
    """Whether adapters of this parametrisation can be trained by ``method``.

    Raises:
        ConfigError: they cannot; the message says how to attach.
    """
    if init == "vera" and method.planner and PLANNERS[method.planner].initial is not Planner.initial:
        raise ConfigError(
            f"method {method.name!r} begins with factors of its own, and init='vera' with the same random ones in "
            "every layer; choose ranks in another way, or attach with another init"
        )
    if init in FIXED_Q:
        if _of_fixed_basis(method):
            return
        others = ", ".join(m.name for m in METHODS.values() if m.when == "during" and _of_fixed_basis(m))
        raise ConfigError(
            f"method {method.name!r} trains or turns both P and Q, which init={init!r} leaves as they were drawn; use "
            f"one of {others}, or a method that chooses before training"
        )
    if init == method.init or method.rule == "shrink" and (init == "gate" or not method.score):
        return
    if init == "lora":
        raise ConfigError(
            f"method {method.name!r} needs adapters with a trained Λ; these were attached with init='lora', attach "
            f"with init={method.init!r}"
        )
    raise ConfigError(
        f"method {method.name!r} trains adapters of init={method.init!r}; these were attached with init={init!r}"
    )


def basis_of(method: Method, init: str, options: dict[str, Any]) -> tuple[bool, float]:
    """(canonical, orthogonal) of a run: the options of these names, taken out of ``options``, or the method's own.

    Raises:
        ConfigError: one is out of its range, or turns a basis that is not trained.
    """
    fixed = init in FIXED_Q
    canonical = flag("canonical", options.pop("canonical", method.canonical and not fixed))
    default = 0.0 if canonical or fixed else method.orthogonal
    orthogonal = number("orthogonal", options.pop("orthogonal", default))
    if fixed and (canonical or orthogonal):
        which = "canonical=True" if canonical else f"orthogonal={orthogonal:g}"
        raise ConfigError(f"{which} changes both P and Q, and init={init!r} trains at most one of them; leave it out")
    return canonical, orthogonal


def _of_fixed_basis(method: Method) -> bool:
    return method.rule == "shrink" and (not method.score or SCORES[method.score].any_basis)


def check_spendable(plan: BudgetPlan, adapters: Adapters) -> None:
    """A budget must buy a rank, and adapters that an earlier run shrank cannot spend more than they hold.

    Raises:
        BudgetError: neither holds.
    """
    cheapest = min(plan.costs) * plan.multiple_of
    if 0 < plan.target < cheapest:
        raise BudgetError(
            f"the budget of {plan.target:,} {plan.unit} buys no rank: the cheapest costs {cheapest:,}; raise it, "
            "or to prune every rank say ranks=0"
        )
    unspent = plan.target - plan.spent([a.rank for a in adapters])
    growable = [c for c, a, cap in zip(plan.costs, adapters, plan.caps, strict=True) if a.rank < cap]
    if growable and unspent >= min(growable) * plan.multiple_of:
        raise BudgetError(
            f"the budget of {plan.target:,} {plan.unit} is {unspent:,} above what these adapters still hold after "
            "ranks were removed; lower it, or attach anew"
        )


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
