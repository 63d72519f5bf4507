"""What a controller checks before it begins: do method, budget and adapters fit together?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..adapters.adapter_set import Adapters
from ..budget import BudgetPlan
from ..errors import BudgetError


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
