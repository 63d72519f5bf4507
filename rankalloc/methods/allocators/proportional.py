"""Ranks proportional to one weight per layer, the budget met exactly by largest remainders.

Layer l is due q_l = clip(k · w_l, floor, cap) ranks, with k such that Σ cost_l · q_l is the budget (also in parameters
or bytes); the amount that a cap frees goes to the others in the same proportion. Whole blocks come first, then the
largest remainders (Hamilton's method): the rule of FIM-LoRA (arXiv 2605.16800) and, without its rounding error, of GoRA
(arXiv 2502.12171).

Known weakness: a weight measures how much a layer matters, not in how many directions.
"""

from __future__ import annotations

import numpy as np

from .base import Blocks, Demand, Kept, Scores, fill


def allocate(scores: Scores, demand: Demand) -> Kept:
    """Keep ranks ∝ the layer's weight: its highest score, or zero if that is negative. Scores within a layer only
    decide which of its triplets are kept."""
    weights = np.array([max(0.0, float(np.max(values, initial=0.0))) for values in scores])
    size = demand.multiple_of
    caps = [min(cap, len(values)) // size * size for cap, values in zip(demand.caps, scores, strict=True)]

    def priority(blocks: Blocks) -> np.ndarray:
        due = quotas(weights, demand.amount, np.array(demand.costs), np.array(demand.floors), np.array(caps))
        # the part of the quota that is open before this block: at least 1 for whole blocks, then the remainder.
        # Rounded, so that equal remainders stay equal regardless of the order of computation
        return np.round(due[blocks.layer] / size - blocks.position, 9)

    return fill(scores, demand, priority)


def quotas(
    weights: np.ndarray, amount: float, costs: np.ndarray, floors: np.ndarray, caps: np.ndarray
) -> np.ndarray:
    """Fractional ranks clip(k · w, floor, cap), each array (layers,), that cost ``amount`` in total; layers of zero
    weight share the remainder equally once all others are full."""
    top = weights.max(initial=0.0)
    weights = weights / top if top > 0 else np.ones(len(weights))
    weights = np.where(weights > 1e-12, weights, 0.0)
    full = np.where(weights > 0, caps, floors).astype(float)
    if weights.any() and not weights.all() and (costs * full).sum() < amount:
        return quotas((weights == 0).astype(float), amount, costs, full, caps)
    floors, caps = floors.astype(float), caps.astype(float)
    if weights.min(initial=1.0) == 0 and weights.any():
        caps = np.where(weights > 0, caps, floors)
    heavy = np.maximum(weights, 1e-12)

    def at(k: float) -> np.ndarray:
        return np.clip(k * heavy, floors, caps)

    def cost(k: float) -> float:
        return float((costs * at(k)).sum())

    # the cost is piecewise linear in k, with a corner wherever a layer leaves its floor or reaches its cap
    corners = np.unique(np.concatenate([[0.0], floors / heavy, caps / heavy]))
    low, high = 0, len(corners) - 1
    if cost(corners[high]) <= amount:
        return at(corners[high])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(corners[middle]) <= amount else (low, middle)
    below, above = cost(corners[low]), cost(corners[high])
    share = (amount - below) / (above - below) if above > below else 0.0
    return at(corners[low] + share * (corners[high] - corners[low]))
