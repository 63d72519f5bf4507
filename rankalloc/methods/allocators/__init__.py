"""Allocation rules: (scores, demand) -> kept. One file each; this is their registry."""

from __future__ import annotations

from collections.abc import Callable

from . import global_topk, grouped, ordered, proportional, random, shuffled, uniform
from .base import Demand, Kept, Scores

ALLOCATORS: dict[str, Callable[[Scores, Demand], Kept]] = {
    "global": global_topk.allocate,
    "ordered": ordered.allocate,
    "uniform": uniform.allocate,
    "random": random.allocate,
    "shuffled": shuffled.allocate,
    "grouped": grouped.allocate,
    "proportional": proportional.allocate,
}

__all__ = ["ALLOCATORS", "Demand", "Kept", "Scores"]
