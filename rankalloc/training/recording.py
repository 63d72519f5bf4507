"""The records that a controller adds to its trace, built from plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..adapters.adapter_set import Adapters
from ..budget import BudgetPlan, RankBudget
from ..trace import AllocationRecord, BudgetRecord, RankTrace, ScoreRecord
from .environment import describe

Masks = Sequence[np.ndarray]


def new_trace(
    adapters: Adapters,
    method: str,
    options: dict[str, Any],
    budget: RankBudget,
    plan: BudgetPlan,
    seed: int | None,
    state_bytes: int,
) -> RankTrace:
    """The trace of a run that is about to begin."""
    return RankTrace(
        method=method, method_options=options, seed=seed, alpha=adapters.alpha, rank=adapters.rank,
        scaling=adapters.scaling, layers=adapters.layer_records(), heads=adapters.head_params(),
        budget=BudgetRecord(
            given=budget.given, unit=plan.unit, target=plan.target, initial=plan.initial, min_rank=budget.min_rank,
            max_rank=budget.max_rank, multiple_of=plan.multiple_of, shape=plan.shape, total_steps=plan.total_steps,
            warmup_steps=plan.warmup_steps, freeze_step=plan.freeze_step, allocate_every=plan.every,
        ),
        adapter_params_initial=adapters.num_params(), trained_params_initial=adapters.trainable_params(),
        allocator_state_bytes=state_bytes,
        environment=describe(next(iter(adapters)).P.device.type), alerts=list(adapters.notes),
    )


def allocation_record(
    step: int, asked: int, plan: BudgetPlan, before: Masks, kept: Masks, scores: Sequence[np.ndarray] | None
) -> AllocationRecord:
    """One allocation: per layer the masks (r,) before and after, and the scores (r,) it went by, if any."""
    ranks = [int(mask.sum()) for mask in kept]
    was, now = np.concatenate(before), np.concatenate(kept)
    flat = np.concatenate(scores) if scores is not None else np.zeros(0)
    return AllocationRecord(
        step=step, asked=asked, reached=plan.spent(ranks), ranks=ranks,
        lowest_kept=float(flat[now].min()) if len(flat) and now.any() else None,
        highest_dropped=float(flat[~now].max()) if len(flat) and not now.all() else None,
        dropped=int((was & ~now).sum()), returned=int((~was & now).sum()),
    )


def score_record(
    score: str, step: int, kept: Masks, scores: Sequence[np.ndarray], held: Masks, earlier: ScoreRecord | None
) -> ScoreRecord:
    """All scores of an allocation, per layer: of triplets kept, of those dropped that stay in memory (``held``), and,
    behind what ``earlier`` allocations took out of it, of those that leave now."""
    left = earlier.left if earlier is not None and earlier.left else [[] for _ in kept]
    return ScoreRecord(
        score=score, step=step,
        kept=[_falling(values[mask]) for values, mask in zip(scores, kept, strict=True)],
        dropped=[_falling(v[~mask & stays]) for v, mask, stays in zip(scores, kept, held, strict=True)],
        left=[_falling([*was, *v[~stays]]) for was, v, stays in zip(left, scores, held, strict=True)],
    )


def _falling(values: Sequence[float] | np.ndarray) -> list[float]:
    return np.sort(np.asarray(values, dtype=np.float64))[::-1].tolist()


def close_trace(trace: RankTrace, adapters: Adapters, steps: int) -> None:
    """Add what is known at the end of a run: steps, sizes and the singular values of every update."""
    trace.steps_done = steps
    trace.adapter_params_final, trace.trained_params_final = adapters.num_params(), adapters.trainable_params()
    broken = [name for name, adapter in adapters.modules.items() if not adapter.is_finite()]
    if broken:
        trace.alerts.append(
            f"the weights of {broken[0]} ({len(broken)} adapters in all) are not finite: training diverged; lower the "
            "learning rate, or clip the gradients"
        )
    else:
        trace.singular_values = [values.tolist() for values in adapters.singular_values().values()]
    trace.finished = True
