"""One allocation: canonical form, scores, the choice, masks, what leaves memory, and the record of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..adapters import canonical, memory
from ..adapters.adapter_set import Adapters
from ..budget import BudgetPlan
from ..methods.allocators import Demand
from . import averages, processes
from .recording import allocation_record, score_record
from .run_state import RunState


def allocate(state: RunState, step: int, optimizer: torch.optim.Optimizer | None) -> None:
    """Choose ranks for what ``step`` of the schedule asks, and let what is dropped leave memory where it may."""
    adapters, schedule, rule, trace = state.adapters, state.schedule, state.rule, state.trace
    last = step == schedule.freeze_step
    averages.require_followed(adapters, state.averages)
    if state.settings.canonical:
        _canonicalize(state, optimizer)
    scores = None if state.score is None else state.score.arrays(list(adapters.modules), state.step)
    flat = [np.zeros(adapter.rank) for adapter in adapters]
    demand = _of_reached(Demand.of(schedule, rule.asked(step), state.settings.seed), state)
    masks = [adapter.kept.clone() for adapter in adapters]
    before = [mask.cpu().numpy() for mask in masks]
    preferences = rule.preferences(flat if scores is None else scores, before, step)
    if state.settings.shrink == "events" and not last:
        demand = _looking_ahead(demand, state, preferences)
    kept = state.settings.allocator(preferences, demand)
    _drop(state, kept)
    rule.allocated(masks, step, optimizer)
    averages.drop(state.averages, adapters, masks, rule.pins_dropped)
    processes.check_agreement(adapters, state.step)
    trace.allocations.append(allocation_record(state.step, demand.amount, schedule, before, kept, scores))
    when = state.settings.shrink
    leaving = optimizer if when == "events" or when and last else None
    in_memory = [adapter.kept for adapter in adapters] if last else _in_memory(adapters, schedule)
    if scores is not None and state.settings.method.score is not None:
        # what leaves at the last allocation was weighed against what stays: the record shows it as dropped
        stays = [m.cpu().numpy() for m in in_memory] if leaving and not last else [np.ones_like(k) for k in kept]
        trace.scores = score_record(state.settings.method.score, state.step, kept, scores, stays, trace.scores)
    if leaving is not None:
        if state.score is not None and not last:
            state.score.select(in_memory)
        memory.shrink(adapters, leaving, in_memory)
        adapters.resized()
        averages.shrink(state.averages, in_memory)
        processes.rebuild(adapters.model)
    if last:
        state.score = None  # nothing is scored any more: its state leaves memory too


@torch.no_grad()
def begin(state: RunState) -> None:
    """What the rule does before the first forward pass: its start, and ranks that begin below the peak."""
    adapters, schedule, rule = state.adapters, state.schedule, state.rule
    rule.begin()
    asked = rule.asked(0)
    if asked < schedule.spent([adapter.live_rank for adapter in adapters]):
        live = [adapter.kept.cpu().numpy().copy() for adapter in adapters]
        flat = [np.zeros(len(mask)) for mask in live]
        demand = Demand.of(schedule, asked, state.settings.seed)
        kept = state.settings.allocator(rule.preferences(flat, live, 0), demand)
        _drop(state, kept)
        state.trace.allocations.append(allocation_record(0, asked, schedule, live, kept, None))
    rule.prepare(1)


def _of_reached(demand: Demand, state: RunState) -> Demand:
    """A demand in which layers that never had a gradient get no rank above their floor: they cannot have learned."""
    if not state.idle:
        return demand
    idle = set(state.idle)
    caps = zip(state.adapters.modules, demand.floors, demand.caps, strict=True)
    return replace(demand, caps=tuple(floor if name in idle else cap for name, floor, cap in caps))


def _looking_ahead(demand: Demand, state: RunState, preferences: Sequence[np.ndarray]) -> Demand:
    """A demand that also keeps what the budget at its end would keep by today's scores.

    Where ranks differ in cost, the last of a small budget buys none of the dear ranks but a few cheap ones. A larger
    budget, earlier in the course, spends the same amount on dear ranks and would have thrown the cheap ones out by
    then: what was left to buy came back untrained.
    """
    if len(set(demand.costs)) == 1:
        return demand  # a smaller budget keeps a part of what a larger one does
    at_the_end = state.settings.allocator(preferences, replace(demand, amount=state.schedule.target))
    return replace(demand, floors=tuple(int(mask.sum()) for mask in at_the_end))


def _canonicalize(state: RunState, optimizer: torch.optim.Optimizer | None) -> None:
    """Bring the adapters to canonical form; averages of them and their scores follow."""
    changes = canonical.canonicalize_all(list(state.adapters), optimizer)
    averages.align(state.averages, state.adapters)
    if state.score is not None:
        state.score.rebase([change.mixing for change in changes])


def _drop(state: RunState, kept: Sequence[np.ndarray]) -> None:
    for adapter, mask in zip(state.adapters, kept, strict=True):
        adapter.drop(torch.from_numpy(mask), erase=state.rule.pins_dropped)


def _in_memory(adapters: Adapters, schedule: BudgetPlan) -> list[torch.Tensor]:
    """What stays in memory at an allocation before the last one: what is kept and, where ranks differ in
    cost, as many more of each layer as a later allocation may need to spend what no dearer rank fits into."""
    costs = schedule.costs
    dearest, masks = max(costs), []
    for adapter, cost in zip(adapters, costs, strict=True):
        spare = 0 if cost == dearest == min(costs) else -(-dearest // cost) * schedule.multiple_of
        empty = torch.cumsum(~adapter.kept, 0)
        masks.append(adapter.kept | (~adapter.kept & (empty <= spare)))
    return masks
