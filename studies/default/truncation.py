"""Post-hoc truncation: a finished uniform LoRA, cut to a budget without further training.

ΔW of each layer is put in canonical form, and the largest σ² per parameter over all layers are kept: the smallest loss
of Frobenius norm that the budget allows. Data-free (PARA, arXiv 2604.27796, with a budget instead of a threshold).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import rankalloc as ra
from rankalloc.adapters.adapter_set import Adapters
from rankalloc.adapters.canonical import canonicalize
from rankalloc.methods.allocators import Demand


@torch.no_grad()
def truncate(model: nn.Module, folder: Path, params: int) -> Adapters:
    """Attach the LoRA in ``folder`` to ``model`` with the best ``params`` parameters of it."""
    adapters = ra.load(model, folder)
    for adapter in adapters:
        canonicalize(adapter)
    scores = [(adapter.lam * adapter.scaling).double().square().cpu().numpy() for adapter in adapters]
    plan = ra.RankBudget(params=params).resolve(adapters.shapes())
    kept = ra.ALLOCATORS["global"](scores, Demand.of(plan, params))
    for adapter, mask in zip(adapters, kept, strict=True):
        adapter.drop(torch.from_numpy(mask))
    return adapters
