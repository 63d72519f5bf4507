"""What a controller checks before it begins: do method, budget and adapters fit together?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .adapters import Adapters
from .budget import BudgetPlan
from .errors import BudgetError, ConfigError
from .methods import Method


def check_init(method: Method, init: str) -> None:
    """Whether adapters of this parametrisation can be trained by ``method``.

    Raises:
        ConfigError: they cannot; the message says how to attach.
    """
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
