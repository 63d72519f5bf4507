"""One allocation: canonical form, scores, the choice, masks, what leaves memory, and the record of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..adapters import canonical, memory
from ..methods.allocators import Demand
from . import averages, processes
from .recording import allocation_record, score_record

if TYPE_CHECKING:
    from .controller import RankController


def allocate(controller: RankController, step: int, optimizer: torch.optim.Optimizer | None) -> None:
    """Choose ranks for what ``step`` of the schedule asks, and let what is dropped leave memory where it may."""
    adapters, plan, rule, trace = controller.adapters, controller.plan, controller.rule, controller.trace
    averages.check_told(adapters, controller.averages)
    if controller.canonical:
        changes = canonical.canonicalize_all(list(adapters), optimizer)
        averages.align(controller.averages, adapters)
        controller.score.rebase([change.mixing for change in changes])
    flat = [np.zeros(adapter.rank) for adapter in adapters]
    scores = None if controller.score is None else controller.score.arrays(list(adapters.modules), controller.step)
    demand = Demand.of(plan, rule.asked(step), controller.seed)
    masks = [adapter.kept.clone() for adapter in adapters]
    before = [mask.cpu().numpy() for mask in masks]
    kept = controller.allocate(rule.preferences(flat if scores is None else scores, before, step), demand)
    for adapter, mask in zip(adapters, kept, strict=True):
        adapter.drop(torch.from_numpy(mask), erase=rule.holds)
    rule.allocated(masks, step, optimizer)
    averages.drop(controller.averages, adapters, masks, rule.holds)
    processes.check_agreement(adapters, controller.step)
    trace.allocations.append(allocation_record(controller.step, demand.amount, plan, before, kept, scores))
    last = step == plan.freeze_step
    shrinks = optimizer is not None and (controller.shrink == "events" or controller.shrink and last)
    held = [adapter.kept for adapter in adapters] if last else _held(controller)
    if scores is not None:
        # what leaves at the last allocation was weighed against what stays: the record shows it as dropped
        room = [mask.cpu().numpy() for mask in held] if shrinks and not last else [np.ones_like(k) for k in kept]
        trace.scores = score_record(controller.method.score, controller.step, kept, scores, room, trace.scores)
    if shrinks:
        if controller.score is not None and not last:
            controller.score.select(held)
        memory.shrink(adapters, optimizer, held)
        averages.shrink(controller.averages, held)
        processes.rebuild(adapters.model)
    if last:
        controller.score = None  # nothing is scored any more: its state leaves memory too


@torch.no_grad()
def begin(controller: RankController) -> None:
    """What the rule does before the first forward pass: its start, and ranks that begin below the peak."""
    adapters, plan, rule = controller.adapters, controller.plan, controller.rule
    rule.begin()
    asked = rule.asked(0)
    if asked < plan.spent([adapter.live_rank for adapter in adapters]):
        live = [adapter.kept.cpu().numpy().copy() for adapter in adapters]
        flat = [np.zeros(len(mask)) for mask in live]
        kept = controller.allocate(rule.preferences(flat, live, 0), Demand.of(plan, asked, controller.seed))
        for adapter, mask in zip(adapters, kept, strict=True):
            adapter.drop(torch.from_numpy(mask), erase=rule.holds)
        controller.trace.allocations.append(allocation_record(0, asked, plan, live, kept, None))
    rule.prepare(1)


def _held(controller: RankController) -> list[torch.Tensor]:
    """What stays in memory at an allocation before the last one: what is kept and, where ranks differ in
    cost, as many more of each layer as a later allocation may need to spend what no dearer rank fits into."""
    costs = controller.plan.costs
    dearest, held = max(costs), []
    for adapter, cost in zip(controller.adapters, costs, strict=True):
        spare = 0 if cost == dearest == min(costs) else -(-dearest // cost) * controller.plan.multiple_of
        empty = torch.cumsum(~adapter.kept, 0)
        held.append(adapter.kept | (~adapter.kept & (empty <= spare)))
    return held
