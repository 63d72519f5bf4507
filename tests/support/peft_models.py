"""Tiny models whose adapters are PEFT's own LoRA layers."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from .models import make_llama, make_mlp


def peft_mlp(rank: int = 4, alpha: float = 4, **config) -> PeftModel:
    """The MLP of :func:`make_mlp` with LoRA on all three linear layers, drawn with seed 1."""
    config.setdefault("target_modules", ["0", "2", "4"])
    return peft_of(make_mlp(), rank, alpha, **config)


def peft_llama(rank: int = 4, alpha: float = 8, **config) -> PeftModel:
    """The Llama of :func:`make_llama` with LoRA on all linear layers, drawn with seed 1."""
    config.setdefault("target_modules", "all-linear")
    return peft_of(make_llama(), rank, alpha, **config)


def peft_of(model: nn.Module, rank: int, alpha: float, **config) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, **config))


@torch.no_grad()
def fill(adapters, seed: int = 2) -> None:
    """Give driven layers weights that visibly move the output."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters:
        for factor in (adapter.P, adapter.Q):
            factor.copy_(torch.randn(factor.shape, generator=generator) * 0.2)


def cut_to(adapters, ranks) -> None:
    """Keep the first ``ranks[i]`` triplets of layer i, and take the others out of memory."""
    from rankalloc.adapters import memory

    for adapter, rank in zip(adapters, ranks, strict=True):
        adapter.drop(torch.arange(adapter.rank) < rank)
    memory.shrink(adapters, torch.optim.SGD(adapters.parameters(), lr=0.1))
    adapters.resized()
