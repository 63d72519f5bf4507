"""Ranks chosen before training for adapters that are attached already, at their peak rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..adapters import memory
from ..adapters.adapter_set import Adapters
from ..adapters.plan import RankPlan, initialise
from ..budget import RankBudget
from ..errors import ConfigError, RankallocError
from ..methods import find_method
from ..methods.planners.planning import make_plan
from ..methods.planners.prepared import Prepared, prepare_plan
from ..methods.planners.probe import LossFn
from ..methods.requirements import require_trainable
from . import processes


def plan_adapters(
    adapters: Adapters,
    batches: Iterable[Any] | None,
    budget: RankBudget,
    method: str,
    *,
    placement: str = "chosen",
    seed: int = 0,
    loss_fn: LossFn | None = None,
    **options: Any,
) -> RankPlan:
    """:func:`rankalloc.plan_ranks` for adapters that are attached at their peak rank and have learned nothing yet.

    Raises RankallocError when one has learned, and otherwise as plan_ranks does.
    """
    for name, adapter in adapters.modules.items():
        if (adapter.left() * adapter.lam).any() and adapter.Q.any():
            raise RankallocError(
                f"the adapter of {name} has learned already (its ΔW is not zero): method {method!r} chooses ranks "
                "before training; attach anew"
            )
    prepared = prepare_adapters(adapters, budget, method, placement=placement, seed=seed, **options)
    targets = {name: adapter.base_layer for name, adapter in adapters.modules.items()}
    return make_plan(prepared, adapters.model, targets, batches, adapters.rank, seed, loss_fn)


def prepare_adapters(
    adapters: Adapters, budget: RankBudget, method: str, *, placement: str = "chosen", seed: int = 0, **options: Any
) -> Prepared:
    """The checks of :func:`plan_adapters` that need no data; raises as it does."""
    require_trainable(find_method(method), adapters.init)
    prepared = prepare_plan(adapters.shapes(), budget, method, placement, adapters.bytes_per_param(), seed, options)
    peaks = {shape.name: shape.rank for shape in adapters.shapes()}
    for name, rank in (prepared.given or {}).items():
        if rank > peaks[name]:
            raise ConfigError(
                f"rank_pattern gives {name} rank {rank}, and its adapter holds {peaks[name]}; attach with a higher rank"
            )
    return prepared


def begin(adapters: Adapters, plan: RankPlan, optimizer: torch.optim.Optimizer) -> None:
    """Cut adapters at their peak rank to the ranks of ``plan``, and start them from its factors; the other ranks leave
    memory."""
    for name, adapter in adapters.modules.items():
        adapter.drop(torch.arange(adapter.rank) < plan[name])
    memory.shrink(adapters, optimizer)
    adapters.resized()
    processes.rebuild(adapters.model)
    for adapter in adapters:
        adapter.initial_rank = adapter.rank
    initialise(adapters.modules, plan)
    adapters.plan = plan
