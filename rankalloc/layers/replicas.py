"""Replicas of ``torch.nn.DataParallel``: copies of a model for one call, whose weights are not parameters any more.

DataParallel copies the model to every GPU at each call. The copies hold their weights as plain attributes, so neither
the tuned forward pass of an adapter nor its scores, which read gradients after the backward pass, can use them.
DistributedDataParallel has no such copies.
"""

from __future__ import annotations

from torch import nn

DATA_PARALLEL = (
    "adapters do not run in torch.nn.DataParallel, which copies the model to every GPU at each call; start one process "
    "per GPU (torchrun or accelerate launch), or show this process one GPU alone (CUDA_VISIBLE_DEVICES=0)"
)
"""Why DataParallel is refused, and what to do instead."""

_NOT_PARAMETERS = (
    "the factors of an adapter are not its parameters any more (parametrized, pruned or flattened), and its forward "
    "pass reads them there; undo that, or leave the adapters out of it"
)


def is_replica(module: nn.Module) -> bool:
    """Whether DataParallel made this copy of a module for one call."""
    return getattr(module, "_is_replica", False)


def why_no_parameters(module: nn.Module) -> str:
    """Why an adapter that misses its parameters cannot run, in one sentence."""
    return DATA_PARALLEL if is_replica(module) else _NOT_PARAMETERS
