"""Adapters without a rank under DistributedDataParallel, which waits for a gradient of every parameter it knows."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .adapter import Adapter

_OURS = "_rankalloc_ddp_ignored"


def leave_out_empty(model: nn.Module) -> None:
    """Tell a DDP wrapper that may be made later not to wait for gradients of adapters without a rank."""
    empty = empty_parameters(model)
    before: frozenset[str] = getattr(model, _OURS, frozenset())
    if empty or before:  # what has a rank again is waited for again
        others = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ())) - before
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(empty | others))
        setattr(model, _OURS, frozenset(empty))


def empty_parameters(model: nn.Module) -> set[str]:
    """Names of the factors of adapters without a rank, our own and those of layers of PEFT's."""
    own = {
        f"{name}.{factor}" for name, module in model.named_modules() if isinstance(module, Adapter) and not module.rank
        for factor, _ in module.named_parameters(recurse=False)
    }
    return own | {name for name, p in model.named_parameters() if p.requires_grad and not p.numel()}
