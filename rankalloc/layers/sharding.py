"""Weights that are sharded over processes: FSDP2 and tensor parallelism keep one part of a tensor in each."""

from __future__ import annotations

import torch
from torch import nn


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is one process's part of a tensor (DTensor: FSDP2, tensor parallelism)."""
    return hasattr(tensor, "device_mesh")


def has_shards(model: nn.Module) -> bool:
    """Whether any weight of ``model`` is sharded over processes."""
    # between a forward and a backward pass FSDP2 may hold a module's weights whole, and the module tells
    return any(hasattr(m, "_get_fsdp_state") for m in model.modules()) or any(map(is_sharded, model.parameters()))
