"""Ranks that were chosen before training, and the factors that adapters begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..budget import RankBudget
from ..errors import ConfigError
from .triplets import Triplets


@dataclass(frozen=True)
class Start:
    """The factors that one adapter begins with: ``P`` (d_out, r) and ``Q`` (r, d_in), with ΔW = P Q at the first step
    whatever the scaling will be."""

    P: torch.Tensor
    Q: torch.Tensor


class RankPlan(dict[str, int]):
    """{module name: rank}, from :func:`rankalloc.plan_ranks`; :func:`rankalloc.attach` takes it as ``ranks=``.

    Attributes:
        method: key of ``rankalloc.METHODS`` that chose.
        init: parametrisation the method trains; attach's default.
        rank: the peak rank it was planned at; attach's default, and so the denominator of the scaling.
        budget: what the plan spends; None for a manual pattern taken as it is.
        factors: {module name: Start} of the layers that the method initialises; {} for none.
        notes: what the user should know, one sentence each.
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        method: str,
        init: str,
        rank: int,
        budget: RankBudget | None,
        factors: Mapping[str, Start] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(ranks)
        self.method, self.init, self.rank, self.budget = method, init, rank, budget
        self.factors = dict(factors or {})
        self.notes = list(notes)

    def __reduce__(self) -> Any:
        # a dict's own way of being copied and pickled does not know the constructor's arguments
        state = (dict(self), self.method, self.init, self.rank, self.budget, self.factors, self.notes)
        return type(self), state


@torch.no_grad()
def initialise(modules: Mapping[str, Triplets], plan: RankPlan) -> None:
    """Write the plan's factors into adapters that hold its ranks; the others stay as they are.

    Raises:
        ConfigError: a rank of the plan was changed after its factors were made; nothing has changed then.
    """
    for name, factors in plan.factors.items():
        if name in modules and modules[name].rank != len(factors.Q):
            raise ConfigError(
                f"the plan begins {name} with factors of rank {len(factors.Q)}, and its rank is now "
                f"{modules[name].rank}; plan again, or pass dict(plan) to leave the plan's factors out"
            )
    for name, factors in plan.factors.items():
        if name in modules:
            adapter = modules[name]
            adapter.P.copy_(factors.P / adapter.scaling)
            adapter.Q.copy_(factors.Q)
            adapter.lam.fill_(1.0)


