"""Ranks chosen before training: what each layer starts, and ends, with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from . import compact
from .adapter import Adapter
from .adapters import Adapters
from .allocators import ALLOCATORS, Demand
from .base_layers import shape_of
from .budget import BudgetPlan, LayerShape, RankBudget
from .errors import BudgetError, ConfigError, RankallocError, TargetError, unknown
from .methods import METHODS, PLACEMENTS, Method, find_method
from .planners import PLANNERS, Planner
from .planners.probe import LossFn, Probe, unchanged
from .rank_plan import RankPlan, budget_of, initialise
from .targets import ALL_LINEAR, Targets, check_heads, find_heads, find_targets

__all__ = ["budget_of", "first_batches", "layer_shapes", "plan_adapters", "plan_ranks"]


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
    prepared = _prepare(shapes, budget, method, placement, bytes_per_param, seed, options)
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
        if (adapter.P * adapter.lam).any() and adapter.Q.any():
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
    prepared = _prepare(
        adapters.shapes(), budget, method, placement, adapters.bytes_per_param(), seed, options
    )
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
    compact.shrink(adapters, optimizer)
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


@dataclass(frozen=True)
class Prepared:
    """A plan about to be made: everything but the data has been checked."""

    method: Method
    planner: Planner | None
    placement: str
    budget: RankBudget | None
    shapes: list[LayerShape]
    given: dict[str, int] | None
    demand: Demand | None

    def choose(self, scores: Mapping[str, np.ndarray]) -> dict[str, int]:
        """{name: rank} that these scores {name: (peak rank,)} lead to under the method's placement."""
        names = [shape.name for shape in self.shapes]
        kept = ALLOCATORS[self.method.allocator]([scores[name] for name in names], self.demand)
        if self.placement != "chosen":
            kept = self._moved([int(mask.sum()) for mask in kept])
        return {name: int(mask.sum()) for name, mask in zip(names, kept, strict=True)}

    def _moved(self, ranks: Sequence[int]) -> list[np.ndarray]:
        """The method's own ranks under another placement: what it chose is worth its cost, the rest nothing."""
        worth = [
            (np.arange(shape.rank) < rank) * float(cost)
            for shape, rank, cost in zip(self.shapes, ranks, self.demand.costs, strict=True)
        ]
        return ALLOCATORS[self.placement](worth, self.demand)

    def placed(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Ranks that were given, under the method's placement."""
        if self.placement == "chosen":
            return dict(ranks)
        kept = self._moved([ranks[shape.name] for shape in self.shapes])
        return {shape.name: int(mask.sum()) for shape, mask in zip(self.shapes, kept, strict=True)}


def _prepare(
    shapes: list[LayerShape],
    budget: RankBudget | None,
    method: str,
    placement: str,
    bytes_per_param: int,
    seed: int | None,
    options: dict[str, Any],
) -> Prepared:
    chosen = find_method(method)
    if chosen.when != "before":
        early = [m.name for m in METHODS.values() if m.when == "before"]
        raise ConfigError(f"method {method!r} chooses ranks while training; before it, use one of: {', '.join(early)}")
    strangers = [name for name in options if name not in chosen.options]
    if strangers or (placement != "chosen" and "placement" not in chosen.options):
        stranger = (strangers or ["placement"])[0]
        raise ConfigError(unknown(f"option of method {method!r}:", stranger, chosen.options or ["none"]))
    if placement not in PLACEMENTS:
        raise ConfigError(unknown("placement", placement, PLACEMENTS))
    planner = PLANNERS[chosen.planner](**options) if chosen.planner is not None else None
    given = planner.given(shapes) if planner is not None else None
    if given is not None:
        # what is asked for may lie above the peak, which is there for the layers that nothing is said about
        fraction = budget is not None and budget.fraction
        asked = None if fraction or budget is None else budget
        if fraction:
            asked = replace(budget, fraction=None, ranks=int(fraction * sum(s.rank for s in shapes) + 1e-9))
        shapes = [replace(s, rank=max(s.rank, given[s.name])) for s in shapes]
        spent = [replace(s, rank=given[s.name]) for s in shapes]
        asked = asked or budget_of(spent, RankBudget(ranks=0))
        plan = asked.resolve(shapes, bytes_per_param=bytes_per_param)
        _check_given(plan, [s.rank for s in spent], shapes, asked)
    elif budget is None:
        raise ConfigError(f"method {method!r} needs a budget, such as RankBudget(fraction=0.5); 'manual' goes without")
    else:
        plan = budget.resolve(shapes, bytes_per_param=bytes_per_param)
        cheapest = min(plan.costs) * plan.multiple_of
        if 0 < plan.target < cheapest:
            raise BudgetError(
                f"the budget of {plan.target:,} {plan.unit} buys no rank: the cheapest costs {cheapest:,}; raise it, "
                "or to prune every rank say ranks=0"
            )
    demand = Demand.at(plan, plan.freeze_step, seed or 0)
    return Prepared(chosen, planner, placement, budget, shapes, given, demand)


def _check_given(plan: BudgetPlan, ranks: Sequence[int], shapes: Sequence[LayerShape], budget: RankBudget) -> None:
    for shape, rank, floor, cap in zip(shapes, ranks, plan.floors, plan.caps, strict=True):
        if not floor <= rank <= cap or rank % plan.multiple_of:
            raise BudgetError(
                f"rank_pattern gives {shape.name} rank {rank}, and the budget allows multiples of {plan.multiple_of} "
                f"from {floor} to {cap}"
            )
    spent = plan.spent(ranks)
    if not 0 <= plan.target - spent < min(plan.costs) * plan.multiple_of:
        raise BudgetError(
            f"rank_pattern costs {spent:,} {plan.unit} and the budget is {plan.target:,}: change the pattern, or say "
            f"{plan.unit}={spent}"
        )


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
        with unchanged(model):
            held = _held(method.name, batches, planner.max_batches) if planner.needs_data else []
            peaks = {shape.name: shape.rank for shape in prepared.shapes}
            probe = Probe(model, targets, held, peaks, seed or 0, loss_fn)
            ranks = prepared.choose(planner.scores(probe, prepared.choose))
            factors, notes = planner.initial(probe, ranks), probe.notes
    return RankPlan(ranks, method.name, method.init, rank, prepared.budget, factors, notes)


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
