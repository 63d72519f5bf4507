"""One exact allocation beside a sort of the same scores, for the shapes of large models, without their weights."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch

import rankalloc as ra
from rankalloc.methods.allocators import ALLOCATORS, Demand

SHAPES = {
    "7B": (32, 4096, 11008, 4096), "70B": (80, 8192, 28672, 1024), "405B": (126, 16384, 53248, 1024),
}
"""name: layers, width, width of the feed-forward part, outputs of key and value (Llama 2 and 3)"""


def linears(layers: int, width: int, inner: int, kv: int, rank: int) -> list[ra.LayerShape]:
    one = [
        ("q", width, width), ("k", width, kv), ("v", width, kv), ("o", width, width), ("gate", width, inner),
        ("up", width, inner), ("down", inner, width),
    ]
    return [ra.LayerShape(f"layers.{n}.{name}", d_in, d_out, rank) for n in range(layers) for name, d_in, d_out in one]


def one(shapes: list[ra.LayerShape], repeats: int = 9) -> dict[str, Any]:
    """CPU seconds of an allocation with a parameter budget of a third, floors and caps, and of torch.sort."""
    rank = shapes[0].rank
    spent = sum(s.params_per_rank * s.rank for s in shapes) // 3
    plan = ra.RankBudget(params=spent, min_rank=2, max_rank=rank - 4).resolve(shapes)
    demand = Demand.at(plan, 1)
    draw = np.random.default_rng(0)
    scores = [draw.gamma(0.5, size=rank) for _ in shapes]
    flat = torch.from_numpy(np.concatenate(scores))
    allocating, sorting = [], []
    for _ in range(repeats):
        begun = time.process_time()
        torch.sort(flat)
        between = time.process_time()
        kept = ALLOCATORS["global"](scores, demand)
        allocating.append(time.process_time() - between)
        sorting.append(between - begun)
    return {
        "triplets": len(flat), "seconds": statistics.median(allocating), "sort": statistics.median(sorting),
        "ratio": statistics.median(a / s for a, s in zip(allocating, sorting, strict=True)),
        "unspent": plan.target - plan.spent([int(mask.sum()) for mask in kept]), "cheapest": min(plan.costs),
    }


def measure() -> dict[str, dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {name: one(linears(*shape, rank=64)) for name, shape in SHAPES.items()}
        layers, *rest = SHAPES["70B"]
        found["a million triplets"] = one(linears(layers * 28, *rest, rank=64))
        return found
    finally:
        torch.set_num_threads(threads)
