"""Ranks chosen before training: what each layer starts, and ends, with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from .allocators import ALLOCATORS, Demand
from .base_layers import shape_of
from .budget import LayerShape, RankBudget
from .errors import ConfigError
from .methods import METHODS, find_method
from .targets import ALL_LINEAR, Targets, check_heads, find_heads, find_targets


def layer_shapes(
    model: nn.Module,
    rank: int,
    target_modules: Targets = ALL_LINEAR,
    exclude_modules: Sequence[str] = (),
    modules_to_save: Sequence[str] | None = None,
) -> list[LayerShape]:
    """The layers that :func:`rankalloc.attach` would adapt with these arguments; changes nothing.

    Raises TargetError as attach does.
    """
    heads = find_heads(model) if modules_to_save is None else check_heads(model, modules_to_save)
    targets = find_targets(model, target_modules, exclude_modules, heads)
    return [LayerShape(name, *shape_of(module), rank) for name, module in targets.items()]


def plan_ranks(
    model: nn.Module,
    batches: Iterable[Any] | None,
    budget: RankBudget,
    method: str = "uniform",
    *,
    rank: int = 12,
    bytes_per_param: int = 4,
    **targets: Any,
) -> dict[str, int]:
    """{module name: rank} that spends ``budget``, for ``rankalloc.attach(model, ranks=...)``.

    Args:
        model: not adapted yet; not changed.
        batches: training batches for methods that look at data; "uniform" takes None.
        budget: a fraction is one of ``rank`` × layers.
        method: a key of ``rankalloc.METHODS`` that chooses before training.
        rank: the highest rank of a layer, unless the budget says a lower ``max_rank``.
        bytes_per_param: element size of the adapters to come.
        targets: target_modules, exclude_modules, modules_to_save as for attach.

    Raises:
        ConfigError: the method chooses its ranks while training.
        BudgetError: the budget does not fit.
    """
    chosen = find_method(method)
    if chosen.when != "before":
        early = [m.name for m in METHODS.values() if m.when == "before"]
        raise ConfigError(f"method {method!r} chooses ranks while training; before it, use one of: {', '.join(early)}")
    shapes = layer_shapes(model, rank, **targets)
    plan = budget.resolve(shapes, bytes_per_param=bytes_per_param)
    kept = ALLOCATORS[chosen.allocator]([np.zeros(shape.rank) for shape in shapes], Demand.at(plan, plan.freeze_step))
    return {shape.name: int(mask.sum()) for shape, mask in zip(shapes, kept, strict=True)}


def budget_of(shapes: Sequence[LayerShape], budget: RankBudget, bytes_per_param: int = 4) -> RankBudget:
    """``budget`` restated for adapters that begin at their final ranks: what ``shapes`` cost, in the
    same unit."""
    unit = "params" if budget.params is not None else "bytes" if budget.bytes is not None else "ranks"
    each = {"ranks": 0, "params": 1, "bytes": bytes_per_param}[unit]
    spent = sum((shape.params_per_rank * each or 1) * shape.rank for shape in shapes)
    return replace(budget, **{"ranks": None, "params": None, "bytes": None, "fraction": None, unit: spent})
