"""Several processes: adapters that change size under DistributedDataParallel, and the proof that all agree.

DDP averages gradients before any score sees them, so every process scores, and allocates, alike without a word
said; one all-reduce of two numbers an allocation makes sure of it. What DDP cannot do is go on when parameters
change their size: its buckets are of the old one. They are built anew, as DDP does when it is unpickled.

A base that is sharded over processes is the matter of :mod:`rankalloc.training.sharding`.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..adapters.adapter import Adapter
from ..errors import RankallocError


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def wrappers_of(model: nn.Module) -> list[DistributedDataParallel]:
    """The living DDP wrappers around ``model``, whoever made them: the user, accelerate or the Trainer."""
    # the type, and not isinstance, which asks every object in memory for its __class__
    found = [item for item in gc.get_objects() if issubclass(type(item), DistributedDataParallel)]
    return [wrapper for wrapper in found if any(module is model for module in wrapper.module.modules())]


def rebuild(model: nn.Module) -> None:
    """Give every DDP wrapper of ``model`` new buckets, after parameters have changed their size.

    Raises:
        RankallocError: a wrapper was told that its graph never changes (static_graph).
    """
    for wrapper in wrappers_of(model) if several_processes() else ():
        if wrapper.static_graph:
            raise RankallocError(
                "DistributedDataParallel(static_graph=True) cannot follow ranks that leave memory; drop that option, "
                "or use shrink=False"
            )
        wrapper.parameters_to_ignore |= _empty(wrapper.module)
        parameters, sparse = wrapper._build_params_for_reducer()
        if parameters:
            names = wrapper._build_debug_param_to_name_mapping(parameters)
            wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)


def leave_out_empty(model: nn.Module) -> None:
    """Tell the DDP wrapper that may come not to wait for gradients of adapters without a rank."""
    if empty := _empty(model):
        others = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(empty | others))


def _empty(model: nn.Module) -> set[str]:
    return {
        f"{name}.{factor}" for name, module in model.named_modules() if isinstance(module, Adapter) and not module.rank
        for factor, _ in module.named_parameters(recurse=False)
    }


def check_agreement(adapters: Iterable[Adapter], step: int) -> None:
    """Raise RankallocError in every process when they did not all keep the same triplets.

    One all-reduce of two 64-bit numbers.
    """
    if not several_processes():
        return
    adapters = list(adapters)
    digest = hashlib.sha256(b"".join(adapter.kept.cpu().numpy().tobytes() + b"|" for adapter in adapters)).digest()
    own = int.from_bytes(digest[:7], "big")
    extremes = torch.tensor([own, -own], dtype=torch.int64, device=adapters[0].kept.device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if int(extremes[0]) != -int(extremes[1]):
        raise RankallocError(
            f"the processes chose different ranks at step {step}: their gradients were not the same. Wrap the model in "
            "DistributedDataParallel (or let the Trainer do so) or shard its base (fully_shard), and call observe() "
            "after the backward pass that averages gradients"
        )
