"""Adapters of mixed ranks that readers are given: trained, shrunk, composed and extracted."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

import rankalloc as ra

SOURCES = ("trained", "shrunk", "composed", "extracted")


def fill(adapters: ra.Adapters, seed: int, size: float = 0.02) -> None:
    """Weights that move the outputs, and ranks that differ: 0 to the highest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for place, adapter in enumerate(adapters):
            for factor, scale in ((adapter.P, size), (adapter.lam, 1.0), (adapter.Q, size)):
                factor.copy_(torch.randn(factor.shape, generator=generator) * scale)
            adapter.drop(torch.arange(adapter.rank) < (place * 5 + seed) % (adapter.rank + 1))


def sample(source: str, base: nn.Module, folder: Path, rank: int = 8, size: float = 0.02, **attach: object) -> Path:
    """An adapter of ``base`` in ``folder``, in the compact layout; ``base`` stays as it is.

    Args:
        source: one of :data:`SOURCES`.
        attach: further arguments of :func:`rankalloc.attach`.
    """
    parts = []
    for seed in (1, 2):
        adapters = ra.attach(copy.deepcopy(base), rank=rank, **attach)  # type: ignore[arg-type]
        fill(adapters, seed, size)
        parts.append(ra.save(adapters, folder / f"part-{seed}"))
    out = folder / source
    if source == "trained":
        return parts[0]
    if source == "shrunk":
        ra.shrink(parts[0], ra.RankBudget(fraction=0.5), out)
    elif source == "composed":
        ra.compose(parts, weights=[0.7, -0.3], budget=ra.RankBudget(fraction=0.4), out=out, missing="zero")
    else:
        tuned = copy.deepcopy(base)
        ra.merge(ra.load(tuned, parts[0]))
        for name, model in (("base", base), ("tuned", tuned)):
            model.save_pretrained(folder / name)  # type: ignore[operator]
        ra.extract(folder / "base", folder / "tuned", ra.RankBudget(fraction=0.5), out, rank=rank)
    return out
