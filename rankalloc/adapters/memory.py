"""Taking dropped triplets out of memory: parameters, gradients and optimizer state.

Parameters keep their identity (only ``.data`` is replaced), so optimizers, schedulers, gradient
clipping and references held elsewhere go on working.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..errors import NotAdaptedError
from . import optimizer_state
from .triplets import Triplets


def require_trained(adapters: Iterable[Triplets], optimizer: torch.optim.Optimizer) -> None:
    """Make sure that ``optimizer`` trains these adapters.

    Raises:
        NotAdaptedError: it does not hold their parameters.
    """
    groups = optimizer_state.unwrap(optimizer).param_groups
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    if any(id(parameter) not in trained for adapter in adapters for parameter in adapter.trained()):
        raise NotAdaptedError(
            "the optimizer does not hold the adapters' parameters, so they would never learn; make it after "
            "rankalloc.attach"
        )


@torch.no_grad()
def shrink(
    adapters: Iterable[Triplets], optimizer: torch.optim.Optimizer, in_memory: Sequence[torch.Tensor] | None = None
) -> None:
    """Remove every triplet that is not kept from the adapters and from the optimizer's state.

    The function that the model computes does not change: a dropped triplet has no part in ΔW already.

    Args:
        in_memory: per adapter a mask (r,) of what stays in memory, where that is more than what is kept.

    Raises:
        RankallocError: the optimizer's state cannot be sliced; nothing has been changed then.
    """
    adapters = list(adapters)
    masks = [adapter.kept for adapter in adapters] if in_memory is None else in_memory
    planned = []
    for adapter, mask in zip(adapters, masks, strict=True):
        index = mask.nonzero().flatten()
        if len(index) < adapter.rank:
            planned.append((adapter, index, optimizer_state.select(adapter, optimizer, index)))
    for adapter, index, apply in planned:
        apply()
        adapter.select(index)
