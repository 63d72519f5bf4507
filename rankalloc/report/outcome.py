"""What a run reached: its budget, its quality, and whether its ranks had settled."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from ..trace import EvaluationRecord, RankTrace
from .audited import SHARES
from .tables import unit_cost
from .wording import count


def reached(trace: RankTrace) -> int:
    """The final ranks' spending, in the budget's unit."""
    return trace.allocations[-1].reached if trace.allocations else trace.budget.initial


def budget_state(trace: RankTrace) -> Literal["exact", "within", "over", "under"]:
    """Whether the target was met: exactly, to within one step of the cheapest layer, or not."""
    spent, target = reached(trace), trace.budget.target
    if spent == target:
        return "exact"
    if spent > target:
        return "over"
    costs = [unit_cost(layer, trace.budget.unit) for layer in trace.layers]
    params = sum(c * r for c, r in zip(costs, trace.final_ranks, strict=True))
    per_unit = spent / params if trace.budget.unit == "bytes" and params else 1
    step = min(costs, default=1) * max(1, trace.budget.multiple_of) * per_unit
    return "within" if target - spent < step else "under"


def budget_phrase(trace: RankTrace) -> str:
    """The budget's state as a clause without a full stop."""
    unit = {"ranks": "ranks", "params": "parameters", "bytes": "bytes"}[trace.budget.unit]
    amount = f"{count(reached(trace))} of {count(trace.budget.target)} {unit}"
    return {
        "exact": f"The budget was met exactly ({amount})",
        "within": f"The budget was met to within one rank of the cheapest layer ({amount})",
        "over": f"The budget was not met: {amount} are still in use",
        "under": f"The budget was not spent in full ({amount})",
    }[budget_state(trace)]


def judged(trace: RankTrace) -> EvaluationRecord | None:
    """The evaluation that a verdict is based on: the report split's, else the tuning split's, else the last."""
    last = trace.evaluations[-1] if trace.evaluations else None
    return trace.evaluation("report") or trace.evaluation("tune") or last


def headline_metric(record: EvaluationRecord, metric: str | None = None) -> tuple[str, float] | None:
    """The metric to quote: ``metric`` if it was measured, else the first that is no loss, else the first."""
    if metric in record.metrics:
        return metric, record.metrics[metric]
    names = sorted(record.metrics, key=lambda name: "loss" in name)
    return (names[0], record.metrics[names[0]]) if names else None


_HIGHER = {"spearman", "pearson", "rouge_l", "reward_margin", "bleu", *SHARES}
_LOWER = {"perplexity", "mse", "rmse", "mae", "wer", "cer"}


def is_higher_better(metric: str) -> bool | None:
    """Whether the metric is one to raise; None for a name that is not known."""
    if "loss" in metric or metric in _LOWER:
        return False
    return True if metric in _HIGHER else None


def contradicts(
    metric: str, one: float | None, other: float | None, loss: float, higher: bool | None = None
) -> bool:
    """Whether a metric speaks for one side, and the ``loss`` difference, one less the other, against it. ``higher`` is
    whether it is one to raise, where the record says so."""
    higher = is_higher_better(metric) if higher is None else higher
    if higher is None or one is None or other is None or "loss" in metric:
        return False
    gain = one - other if higher else other - one
    return gain * loss > 0


def moved_at_freeze(trace: RankTrace) -> tuple[int, int]:
    """(ranks that went to another layer at the last allocation or the one before, whichever is more;
    the total). Only gains count: while the budget falls, they are the moves."""
    last = [a.ranks for a in trace.allocations[-3:]]
    gains = [sum(max(0, b - a) for a, b in zip(old, new, strict=True)) for old, new in pairwise(last)]
    return max(gains, default=0), sum(trace.final_ranks)
