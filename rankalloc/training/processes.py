"""Several processes: adapters that change size under DistributedDataParallel, and the proof that all agree.

DDP averages gradients before any score sees them, so all processes compute the same scores and ranks without
communicating; one all-reduce of two numbers an allocation verifies it. What DDP cannot do is go on when parameters
change their size: its buckets have the old one. They are rebuilt as DDP does when it is unpickled.

For a base that is sharded over processes see :mod:`rankalloc.training.sharding`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..adapters.ddp import empty_parameters
from ..adapters.triplets import Triplets
from ..errors import RankallocError
from .wrappers import wrappers_of


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rebuild(model: nn.Module) -> None:
    """Give every DDP wrapper of ``model`` new buckets, after parameters have changed their size.

    Raises:
        RankallocError: a wrapper was made with static_graph=True, so its graph may not change.
    """
    for wrapper in wrappers_of([model], DistributedDataParallel) if several_processes() else ():
        if wrapper.static_graph:
            raise RankallocError(
                "DistributedDataParallel(static_graph=True) cannot follow ranks that leave memory; drop that option, "
                "or use shrink=False"
            )
        wrapper.parameters_to_ignore |= empty_parameters(wrapper.module)
        parameters, sparse = wrapper._build_params_for_reducer()
        if parameters:
            names = wrapper._build_debug_param_to_name_mapping(parameters)
            wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)


def check_agreement(adapters: Iterable[Triplets], step: int) -> None:
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
