"""Adapters to save, and what PEFT and plain reading make of the saved folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import rankalloc as ra

from .models import MAKERS, prune, randomize

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def adapted(name: str = "bert", ranks=(3, 0, 1, 4, 2, 0), shrink: bool = True, **options):
    """(model, adapters) with visibly trained weights and mixed ranks, some of them zero."""
    model = MAKERS[name]()
    adapters = ra.attach(model, rank=4, alpha=6, **options)
    randomize(adapters)
    live = [ranks[i % len(ranks)] for i in range(len(adapters))]
    if shrink:
        prune(adapters, live)
    else:
        for adapter, rank in zip(adapters, live, strict=True):
            adapter.drop(torch.arange(adapter.rank) < rank)
    return model, adapters


def in_peft(name: str, folder, make=None) -> nn.Module:
    """The model with the adapter that real PEFT reads from ``folder``."""
    import peft

    return peft.PeftModel.from_pretrained((make or MAKERS[name])(), folder)


def read(folder):
    """(configuration, tensors) of a saved folder."""
    return json.loads((Path(folder) / "adapter_config.json").read_text()), load_file(
        Path(folder) / "adapter_model.safetensors"
    )
