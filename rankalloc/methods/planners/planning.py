"""Ranks chosen before training, with which each layer starts and ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from ...adapters.adapter import Adapter
from ...adapters.attaching import require_free
from ...adapters.plan import RankPlan, Start
from ...budget import LayerShape, RankBudget
from ...errors import ConfigError, TargetError
from ...layers.adaptable import kind_of, shape_of
from ...layers.experts import ExpertMatrix
from ...layers.kinds import LINEAR
from ...layers.targets import ALL_LINEAR, Targets, find_heads, find_targets, named_heads
from ...layers.wrapping import unwrapped
from ...options import integer
from .. import find_method
from ..bottlenecks import plan_bottlenecks
from .prepared import Prepared, prepare_plan, require_options
from .probe import LossFn, Probe, unchanged


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
    targets = _targets(model, target_modules, exclude_modules, modules_to_save)
    return [at_peak(LayerShape(name, *shape_of(module), rank)) for name, module in targets.items()]


def plan_ranks(
    model: nn.Module,
    batches: Iterable[Any] | None,
    budget: RankBudget | None,
    method: str = "uniform",
    *,
    rank: int = 12,
    bytes_per_param: int = 4,
    placement: str = "chosen",
    seed: int = 0,
    loss_fn: LossFn | None = None,
    target_modules: Targets = ALL_LINEAR,
    exclude_modules: Sequence[str] = (),
    modules_to_save: Sequence[str] | None = None,
    **options: Any,
) -> RankPlan:
    """{module name: rank} that spends ``budget``, for ``rankalloc.attach(model, ranks=...)``.

    Args:
        model: not adapted yet; not changed.
        batches: training batches for methods that look at data; the first few are kept in memory. Each is a mapping
            for ``model(**batch)``, a pair (x, y), or x alone. None for methods that do not look at data.
        budget: a fraction is a share of the parameters of ``rank`` in every layer. None only for "manual".
        method: a key of ``rankalloc.METHODS`` that chooses before training.
        rank: the highest rank of a layer, unless the budget has a lower ``max_rank``, or one side of the layer's
            weight is smaller.
        bytes_per_param: element size of the adapters to come.
        placement: one of ``rankalloc.methods.PLACEMENTS``: the method's own choice or one of its controls.
        seed: of everything the method draws.
        loss_fn: ``loss_fn(outputs, labels)`` if the model does not return a loss.
        target_modules, exclude_modules, modules_to_save: as for attach.
        options: the method's own (``rankalloc ls methods``).

    Raises:
        ConfigError: the method chooses its ranks while training; an option is unknown or out of range;
            there are no batches, or there is no loss.
        BudgetError: the budget does not fit.
        RankallocError: a loss or gradient is not finite.

    Example:
        >>> import torch, rankalloc as ra
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 8), torch.randint(0, 2, (16,))) for _ in range(4)]
        >>> plan = ra.plan_ranks(model, batches, ra.RankBudget(ranks=4), method="gora", rank=4,
        ...                      loss_fn=torch.nn.functional.cross_entropy)
        >>> sum(ra.attach(model, ranks=plan).ranks().values())
        4
    """
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise TargetError(
            "this model has adapters attached already: plan before rankalloc.attach, or give the Trainer a "
            "RankCallback, which plans for adapters at their start"
        )
    model = unwrapped(model)
    require_free(model)
    rank = integer("rank", rank, 1)
    targets = _targets(model, target_modules, exclude_modules, modules_to_save)
    chosen = find_method(method)
    if not chosen.lora:
        require_options(chosen, options, placement)
        priced = plan_ranks(
            model, None, budget, "uniform", rank=rank, bytes_per_param=bytes_per_param, target_modules=target_modules,
            exclude_modules=exclude_modules, modules_to_save=modules_to_save,
        )
        assert budget is not None, "uniform ranks have one"
        return plan_bottlenecks(targets, priced, budget, rank, bytes_per_param=bytes_per_param, **options)
    multiple = budget.multiple_of if budget is not None else 1
    shapes = [at_peak(LayerShape(name, *shape_of(module), rank), multiple) for name, module in targets.items()]
    prepared = prepare_plan(shapes, budget, method, placement, bytes_per_param, seed, options)
    return make_plan(prepared, model, targets, batches, rank, seed, loss_fn)


def first_batches(dataset: Any, collate: Callable[[list[Any]], Any], size: int) -> Iterator[Any]:
    """Batches of ``size`` examples in the dataset's own order, made one at a time."""
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    rows = (dataset[i] for i in range(len(dataset))) if indexed else iter(dataset)
    while examples := list(islice(rows, size)):
        yield collate(examples)


def at_peak(shape: LayerShape, multiple_of: int = 1) -> LayerShape:
    """A layer with no higher rank than the smaller side of its weight."""
    highest = min(shape.d_in, shape.d_out)
    return shape if shape.rank <= highest else replace(shape, rank=highest // multiple_of * multiple_of)


def make_plan(
    prepared: Prepared,
    model: nn.Module,
    targets: dict[str, nn.Module],
    batches: Iterable[Any] | None,
    rank: int,
    seed: int | None,
    loss_fn: LossFn | None,
) -> RankPlan:
    """Look at the data if the method does, and choose: the ranks of ``targets``, {name: base layer}."""
    method, planner = prepared.method, prepared.planner
    starts: dict[str, Start] = {}
    notes: list[str] = []
    if prepared.given is not None:
        ranks = prepared.placed(prepared.given)
    elif planner is None:
        ranks = prepared.choose({shape.name: np.zeros(shape.rank) for shape in prepared.shapes})
    else:
        if planner.needs_data:
            _require_linear(method.name, targets)
        with unchanged(model):
            taken = _taken(method.name, batches, planner.max_batches) if planner.needs_data else []
            peaks = {shape.name: shape.rank for shape in prepared.shapes}
            probe = Probe(model, targets, taken, peaks, seed or 0, loss_fn)
            ranks = prepared.choose(planner.scores(probe, prepared.choose))
            starts, notes = planner.initial(probe, ranks), probe.notes
    return RankPlan(ranks, method.name, method.init, rank, prepared.budget, starts, notes)


def _require_linear(method: str, targets: Mapping[str, nn.Module]) -> None:
    others = [name for name, module in targets.items() if kind_of(module) not in LINEAR]
    if others and isinstance(targets[others[0]], ExpertMatrix):
        raise ConfigError(
            f"method {method!r} looks at the inputs of linear layers, and those of one expert ({others[0]}) cannot be "
            "watched; leave the experts out with exclude_modules, or choose their ranks by a method that trains or by "
            "'manual'"
        )
    if others:
        raise ConfigError(
            f"method {method!r} looks at the inputs of linear layers, and {others[0]} is a "
            f"{type(targets[others[0]]).__name__}; leave it out of target_modules, or choose its rank by a method that "
            "trains or by 'manual'"
        )


def _taken(method: str, batches: Iterable[Any] | None, count: int) -> list[Any]:
    """The first ``count`` batches."""
    if isinstance(batches, (Mapping, torch.Tensor, str)):
        raise ConfigError(f"batches must be several batches, got one {type(batches).__name__}; pass [batch]")
    taken = list(islice(batches, count)) if batches is not None else []
    if not taken:
        got = "None" if batches is None else "none at all"
        raise ConfigError(f"method {method!r} looks at data to choose ranks: pass training batches, got {got}")
    return taken


def _targets(
    model: nn.Module, target_modules: Targets, exclude: Sequence[str], modules_to_save: Sequence[str] | None
) -> dict[str, nn.Module]:
    model = unwrapped(model)
    heads = find_heads(model) if modules_to_save is None else named_heads(model, modules_to_save)
    return find_targets(model, target_modules, exclude, heads)
