"""Taking dropped triplets out of memory: parameters, gradients and optimizer state.

Parameters keep their identity (only ``.data`` is replaced), so optimizers, schedulers, gradient
clipping and references held elsewhere go on working.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from ..errors import NotAdaptedError, RankallocError
from . import eight_bit
from .adapter import Adapter, replace_data

# factored second moments keep one dimension of the parameter: which one is dropped
_FACTORED = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2, "row_var": -1, "col_var": -2}


def check(adapters: Iterable[Adapter], optimizer: torch.optim.Optimizer | None, shrink: bool) -> None:
    """Make sure that ``optimizer`` trains these adapters and, if ``shrink``, that its state can shrink.

    Called at the first step, so that an unfit optimizer is told of then and not at the freeze.

    Raises:
        NotAdaptedError: no optimizer is given though one is needed, or it does not hold the
            adapters' parameters.
        RankallocError: its state has a shape that rankalloc cannot slice.
    """
    if optimizer is None:
        if shrink:
            raise NotAdaptedError(
                "removing dropped ranks needs the optimizer: call controller.update(optimizer), or make the "
                "controller with shrink=False"
            )
        return
    optimizer = unwrap(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for adapter in adapters:
        if any(id(p) not in held for p in adapter.trained()):
            raise NotAdaptedError(
                "the optimizer does not hold the adapters' parameters, so they would never learn; make it after "
                "rankalloc.attach"
            )
        if shrink:
            for _ in _sliced_state(adapter, optimizer, torch.arange(adapter.rank)):
                pass


@torch.no_grad()
def shrink(
    adapters: Iterable[Adapter], optimizer: torch.optim.Optimizer, held: Sequence[torch.Tensor] | None = None
) -> None:
    """Remove every triplet that is not kept from the adapters and from the optimizer's state.

    The function computed by the model is unchanged: lam of a dropped triplet is zero already.

    Args:
        held: per adapter a mask (r,) of what stays in memory, where that is more than what is kept.

    Raises:
        RankallocError: the optimizer's state cannot be sliced; nothing has been changed then.
    """
    optimizer = unwrap(optimizer)
    planned = []
    adapters = list(adapters)
    masks = [adapter.kept for adapter in adapters] if held is None else held
    for adapter, mask in zip(adapters, masks, strict=True):
        index = mask.nonzero().flatten()
        if len(index) < adapter.rank:
            planned.append((adapter, index, list(_sliced_state(adapter, optimizer, index))))
    for adapter, index, sliced in planned:
        for state, key, tensor in sliced:
            state[key] = tensor
        for parameter, _ in _factors(adapter) if not len(index) else ():
            optimizer.state.pop(parameter, None)  # it gets no gradient any more: not even a count of steps stays
        cut(adapter, index)


@torch.no_grad()
def cut(adapter: Adapter, index: torch.Tensor) -> None:
    """Hold only the triplets ``index`` (k,) from now on; the parameters stay the same objects."""
    for parameter, dim in _factors(adapter):
        replace_data(parameter, parameter.data.index_select(dim, index))
    adapter.kept = adapter.kept.index_select(0, index)


def _factors(adapter: Adapter) -> tuple[tuple[nn.Parameter, int], ...]:
    """The adapter's parameters, each with the dimension that counts its triplets."""
    return (adapter.P, 1), (adapter.lam, 0), (adapter.Q, 0)


def _sliced_state(
    adapter: Adapter, optimizer: torch.optim.Optimizer, index: torch.Tensor
) -> Iterator[tuple[dict, str, torch.Tensor]]:
    """(state dict, key, sliced tensor) for everything the optimizer keeps in a parameter's shape."""
    for parameter, dim in _factors(adapter):
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or (value.numel() == 1 and value.dim() == 0):
                continue
            if eight_bit.belongs_to_packed(state, key):
                continue
            if eight_bit.is_packed(state, key) and value.shape == parameter.shape:
                sliced = eight_bit.unpacked(state, key).index_select(dim, index.to(value.device))
                for part, tensor in eight_bit.packed(state, key, sliced).items():
                    yield state, part, tensor
                continue
            lost = _FACTORED.get(key) if parameter.dim() == 2 and value.shape != parameter.shape else None
            # a subclass (torchao's 8-bit and 4-bit states) packs its numbers in an order of its own
            if value.shape == parameter.shape and type(value) in (torch.Tensor, nn.Parameter):
                yield state, key, value.index_select(dim, index.to(value.device))
            elif lost is not None:
                kept_dim = 0 if lost == -1 else 1
                if kept_dim == dim:
                    where = 0 if value.dim() == 1 else dim
                    yield state, key, value.index_select(where, index.to(value.device))
            else:
                raise RankallocError(
                    f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)}{_packed_as(value)} for a "
                    f"parameter of shape {tuple(parameter.shape)}, which rankalloc cannot "
                    "shrink; use another optimizer or shrink=False"
                )


def _packed_as(value: torch.Tensor) -> str:
    return "" if type(value) in (torch.Tensor, nn.Parameter) else f" ({type(value).__name__})"


def unwrap(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, without what accelerate wraps it in."""
    while hasattr(optimizer, "optimizer"):  # accelerate's AcceleratedOptimizer
        optimizer = optimizer.optimizer
    return optimizer
