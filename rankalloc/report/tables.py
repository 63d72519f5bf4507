"""From a trace to rows: the content of each section of the report as plain data.

Pure functions of :class:`~rankalloc.trace.RankTrace`; no torch, no drawing. Lists of per-layer values
are in the order of ``trace.layers``. :class:`~.facts.Facts` calls each function once a page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from ..trace import AllocationRecord, EvaluationRecord, LayerRecord, RankTrace


@dataclass(frozen=True)
class LayerRow:
    """One row of the full table. ``uniform_rank`` is the layer's rank if all were equal and spent the same,
    ``params`` counts the plain LoRA of its final rank, and ``state`` is "", "zero" or "cap"."""

    name: str
    kind: str
    block: int | None
    role: str
    d_in: int
    d_out: int
    initial_rank: int
    final_rank: int
    uniform_rank: float
    params: int
    largest_singular_value: float | None
    effective_rank: float | None
    state: str


@dataclass(frozen=True)
class History:
    """The course of the allocation: the state at step 0, then one entry for each allocation."""

    steps: list[int]
    asked: list[int]
    reached: list[int]
    ranks: list[list[int]]
    dropped: list[int]
    returned: list[int]
    lowest_kept: list[float | None]
    highest_dropped: list[float | None]


@dataclass(frozen=True)
class ScoreTable:
    """Scores of the last allocation. ``dropped`` ends with the ``left`` triplets that earlier allocations removed from
    memory, with the score they had then. ``margin`` = lowest kept / highest dropped of the last allocation (None when
    either side is empty or the divisor is not positive); ``unplotted`` counts scores <= 0."""

    score: str
    step: int
    kept: list[list[float]]
    dropped: list[list[float]]
    left: int
    lowest_kept: float | None
    highest_dropped: float | None
    margin: float | None
    unplotted: int


@dataclass(frozen=True)
class EvaluationRow:
    """Quality on one split; ``mean_loss`` and ``standard_error`` (s / sqrt(n)) come from the example losses."""

    run: str
    split: str
    examples: int
    metrics: dict[str, float]
    mean_loss: float | None
    standard_error: float | None


def unit_cost(layer: LayerRecord, unit: str) -> int:
    """The cost of one rank of the layer, up to a common factor: 1 for ranks, d_in + d_out otherwise."""
    return 1 if unit == "ranks" else layer.d_in + layer.d_out


def uniform_rank(trace: RankTrace) -> float:
    """The equal rank that spends as much as the final ranks: sum(c·r) / sum(c). May be fractional."""
    costs = [unit_cost(layer, trace.budget.unit) for layer in trace.layers]
    spent = sum(c * r for c, r in zip(costs, trace.final_ranks, strict=True))
    return spent / sum(costs) if sum(costs) else 0.0


def effective_rank(singular_values: list[float]) -> float | None:
    """exp of the entropy of sigma / sum(sigma) (Roy and Vetterli, 2007); None without a positive value."""
    total = sum(singular_values)
    if total <= 0:
        return None
    shares = [s / total for s in singular_values if s > 0]
    return math.exp(-sum(p * math.log(p) for p in shares))


def spectra(trace: RankTrace) -> list[list[float]]:
    """True singular values of each layer's update, descending; empty lists where none were recorded."""
    values = trace.singular_values or []
    return [sorted(values[i], reverse=True) if i < len(values) else [] for i in range(len(trace.layers))]


def cap(trace: RankTrace, layer: LayerRecord) -> int:
    """The largest rank the layer could have ended at."""
    most = trace.budget.max_rank
    return layer.initial_rank if most is None else min(most, layer.initial_rank)


def layer_rows(trace: RankTrace, began: list[int], even: float, sigma: list[list[float]]) -> list[LayerRow]:
    """The full table, from the ranks at step 0, :func:`uniform_rank` and :func:`spectra`."""
    rows = []
    spread = bool(trace.allocations) and len(set(trace.final_ranks)) > 1  # else every layer would be at its cap
    for i, (layer, final) in enumerate(zip(trace.layers, trace.final_ranks, strict=True)):
        state = "zero" if final == 0 else "cap" if spread and final >= cap(trace, layer) else ""
        rows.append(
            LayerRow(
                name=layer.name,
                kind=layer.kind,
                block=layer.block,
                role=layer.role,
                d_in=layer.d_in,
                d_out=layer.d_out,
                initial_rank=began[i],
                final_rank=final,
                uniform_rank=even,
                params=final * (layer.d_in + layer.d_out),
                largest_singular_value=sigma[i][0] if sigma[i] else None,
                effective_rank=effective_rank(sigma[i]),
                state=state,
            )
        )
    return rows


def history(trace: RankTrace) -> History:
    events = trace.allocations
    first = AllocationRecord(
        step=0, asked=trace.budget.initial, reached=trace.budget.initial,
        ranks=[layer.initial_rank for layer in trace.layers],
    )
    if events and events[0].step == 0:  # a rule that begins below the peak records its start as an allocation
        first, events = events[0], events[1:]
    return History(
        steps=[0, *(a.step for a in events)],
        asked=[first.asked, *(a.asked for a in events)],
        reached=[first.reached, *(a.reached for a in events)],
        ranks=[first.ranks, *(a.ranks for a in events)],
        dropped=[0, *(a.dropped for a in events)],
        returned=[0, *(a.returned for a in events)],
        lowest_kept=[None, *(a.lowest_kept for a in events)],
        highest_dropped=[None, *(a.highest_dropped for a in events)],
    )


def thinned(table: History, most: int) -> History:
    """At most ``most`` of the events, evenly spaced; what was dropped and returned between them is added up."""
    picked = thin(len(table.steps), most)
    if len(picked) == len(table.steps):
        return table
    sums = {
        name: [sum(getattr(table, name)[a + 1 : b + 1]) for a, b in pairwise([-1, *picked])]
        for name in ("dropped", "returned")
    }
    kept = {
        name: [getattr(table, name)[k] for k in picked]
        for name in ("steps", "asked", "reached", "ranks", "lowest_kept", "highest_dropped")
    }
    return replace(table, **kept, **sums)


def thin(n: int, most: int) -> list[int]:
    """At most ``most`` of the indices 0 … n - 1, evenly spaced, first and last included."""
    if n <= most:
        return list(range(n))
    return sorted({round(k * (n - 1) / (most - 1)) for k in range(most)})


def score_table(trace: RankTrace) -> ScoreTable | None:
    """The scores to show; None when the run recorded none."""
    record = trace.scores
    if record is None or (not any(record.kept) and not any(record.dropped)):
        return None
    kept = [s for layer in record.kept for s in layer]
    dropped = [s for layer in record.dropped for s in layer]
    left = [s for layer in record.left for s in layer]
    low, high = min(kept, default=None), max(dropped, default=None)
    return ScoreTable(
        score=record.score,
        step=record.step,
        kept=record.kept,
        dropped=[one + two for one, two in zip(record.dropped, record.left or [[]] * len(record.dropped), strict=True)],
        left=len(left),
        lowest_kept=low,
        highest_dropped=high,
        margin=low / high if low is not None and high is not None and high > 0 else None,
        unplotted=sum(s <= 0 for s in kept + dropped + left),
    )


def evaluation_rows(trace: RankTrace, run: str = "this run") -> list[EvaluationRow]:
    return [_evaluation_row(record, run) for record in trace.evaluations]


def _evaluation_row(record: EvaluationRecord, run: str) -> EvaluationRow:
    losses = record.example_losses or []
    mean = sum(losses) / len(losses) if losses else None
    error = None
    if mean is not None and len(losses) > 1:
        error = math.sqrt(sum((x - mean) ** 2 for x in losses) / (len(losses) - 1) / len(losses))
    return EvaluationRow(run, record.split, record.examples, dict(record.metrics), mean, error)
