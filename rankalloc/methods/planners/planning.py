"""Ranks chosen before training: what each layer starts, and ends, with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from ...adapters import memory
from ...adapters.adapter import Adapter
from ...adapters.adapter_set import Adapters
from ...adapters.plan import RankPlan, initialise
from ...budget import LayerShape, RankBudget
from ...errors import ConfigError, RankallocError, TargetError
from ...layers.adaptable import kind_of, shape_of
from ...layers.kinds import LINEAR
from ...layers.targets import ALL_LINEAR, Targets, check_heads, find_heads, find_targets
from ...training import processes
from ...training.checks import check_init
from .. import find_method
from .prepared import Prepared, prepare_plan
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
    return [LayerShape(name, *shape_of(module), rank) for name, module in targets.items()]


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
        batches: training batches for methods that look at data, of which the first few are held in memory:
            mappings for ``model(**batch)``, pairs (x, y), or x alone. None for methods that do not.
        budget: a fraction is one of ``rank`` × layers. None only for "manual".
        method: a key of ``rankalloc.METHODS`` that chooses before training.
        rank: the highest rank of a layer, unless the budget says a lower ``max_rank``, or one side of its
            weight is smaller.
        bytes_per_param: element size of the adapters to come.
        placement: one of ``rankalloc.methods.PLACEMENTS``: the method's own controls.
        seed: of whatever the method draws.
        loss_fn: ``loss_fn(outputs, labels)`` where the model gives no loss of its own.
        target_modules, exclude_modules, modules_to_save: as for attach.
        options: the method's own (``rankalloc ls methods``).

    Raises:
        ConfigError: the method chooses its ranks while training; an option is unknown or out of range;
            there are no batches, or no loss.
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
    targets = _targets(model, target_modules, exclude_modules, modules_to_save)
    multiple = budget.multiple_of if budget is not None else 1
    shapes = [at_peak(LayerShape(name, *shape_of(module), rank), multiple) for name, module in targets.items()]
    prepared = prepare_plan(shapes, budget, method, placement, bytes_per_param, seed, options)
    return _plan(prepared, model, targets, batches, rank, seed, loss_fn)


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
    """:func:`plan_ranks` for adapters that are attached, at their peak rank, and have learned nothing yet.

    Raises RankallocError when one has, and otherwise as plan_ranks does.
    """
    for name, adapter in adapters.modules.items():
        if (adapter.left() * adapter.lam).any() and adapter.Q.any():
            raise RankallocError(
                f"the adapter of {name} has learned already (its ΔW is not zero): method {method!r} chooses ranks "
                "before training; attach anew"
            )
    prepared = prepare_adapters(adapters, budget, method, placement=placement, seed=seed, **options)
    targets = {name: adapter.base_layer for name, adapter in adapters.modules.items()}
    return _plan(prepared, adapters.model, targets, batches, adapters.rank, seed, loss_fn)


def prepare_adapters(
    adapters: Adapters, budget: RankBudget, method: str, *, placement: str = "chosen", seed: int = 0, **options: Any
) -> Prepared:
    """What :func:`plan_adapters` checks before it looks at data; raises as it does."""
    check_init(find_method(method), adapters.init)
    prepared = prepare_plan(adapters.shapes(), budget, method, placement, adapters.bytes_per_param(), seed, options)
    for shape in adapters.shapes() if prepared.given is not None else ():
        if prepared.given[shape.name] > shape.rank:
            raise ConfigError(
                f"rank_pattern gives {shape.name} rank {prepared.given[shape.name]}, and its adapter holds "
                f"{shape.rank}; attach with a higher rank"
            )
    return prepared


def begin(adapters: Adapters, plan: RankPlan, optimizer: torch.optim.Optimizer) -> None:
    """Bring adapters at their peak rank to the ranks and the start of ``plan``; other ranks leave memory."""
    for name, adapter in adapters.modules.items():
        adapter.drop(torch.arange(adapter.rank) < plan[name])
    memory.shrink(adapters, optimizer)
    processes.rebuild(adapters.model)
    for adapter in adapters:
        adapter.initial_rank = adapter.rank
    initialise(adapters, plan)


def first_batches(dataset: Any, collate: Callable[[list[Any]], Any], size: int) -> Iterator[Any]:
    """Batches of ``size`` examples in the dataset's own order, made as they are asked for."""
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    rows = (dataset[i] for i in range(len(dataset))) if indexed else iter(dataset)
    while examples := list(islice(rows, size)):
        yield collate(examples)


def at_peak(shape: LayerShape, multiple_of: int = 1) -> LayerShape:
    """A layer with no higher rank than the smaller side of its weight."""
    highest = min(shape.d_in, shape.d_out)
    return shape if shape.rank <= highest else replace(shape, rank=highest // multiple_of * multiple_of)


def _plan(
    prepared: Prepared,
    model: nn.Module,
    targets: dict[str, nn.Module],
    batches: Iterable[Any] | None,
    rank: int,
    seed: int | None,
    loss_fn: LossFn | None,
) -> RankPlan:
    method, planner = prepared.method, prepared.planner
    factors, notes = {}, []
    if prepared.given is not None:
        ranks = prepared.placed(prepared.given)
    elif planner is None:
        ranks = prepared.choose({shape.name: np.zeros(shape.rank) for shape in prepared.shapes})
    else:
        _check_linear(method.name, planner.needs_data, targets)
        with unchanged(model):
            held = _held(method.name, batches, planner.max_batches) if planner.needs_data else []
            peaks = {shape.name: shape.rank for shape in prepared.shapes}
            probe = Probe(model, targets, held, peaks, seed or 0, loss_fn)
            ranks = prepared.choose(planner.scores(probe, prepared.choose))
            factors, notes = planner.initial(probe, ranks), probe.notes
    return RankPlan(ranks, method.name, method.init, rank, prepared.budget, factors, notes)


def _check_linear(method: str, looks: bool, targets: Mapping[str, nn.Module]) -> None:
    others = [name for name, module in targets.items() if kind_of(module) not in LINEAR]
    if looks and others:
        raise ConfigError(
            f"method {method!r} looks at the inputs of linear layers, and {others[0]} is a "
            f"{type(targets[others[0]]).__name__}; leave it out of target_modules, or choose its rank by a method that "
            "trains or by 'manual'"
        )


def _held(method: str, batches: Iterable[Any] | None, count: int) -> list[Any]:
    if isinstance(batches, (Mapping, torch.Tensor, str)):
        raise ConfigError(f"batches must be several batches, got one {type(batches).__name__}; pass [batch]")
    held = list(islice(batches, count)) if batches is not None else []
    if not held:
        got = "None" if batches is None else "none at all"
        raise ConfigError(f"method {method!r} looks at data to choose ranks: pass training batches, got {got}")
    return held


def _targets(
    model: nn.Module, target_modules: Targets, exclude: Sequence[str], modules_to_save: Sequence[str] | None
) -> dict[str, nn.Module]:
    heads = find_heads(model) if modules_to_save is None else check_heads(model, modules_to_save)
    return find_targets(model, target_modules, exclude, heads)
