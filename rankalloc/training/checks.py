"""What a controller checks before it begins: do method, budget and adapters fit together?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..adapters.adapter import FIXED_Q
from ..adapters.adapter_set import Adapters
from ..budget import BudgetPlan
from ..errors import BudgetError, ConfigError
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
    plan.require_spendable()
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
