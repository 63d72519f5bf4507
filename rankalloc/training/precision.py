"""The number format that adapters train in, whatever a trainer has cast them to.

TRL casts every trainable parameter beside a quantised base to bfloat16 while a trainer is made: SFT, DPO and GRPO
alike, without a word. bfloat16 has eight bits for a number, so an optimizer's steps below a quarter of a percent are
lost, and so is as much of the update whenever the basis changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapters.adapter_set import Adapters
from ..adapters.triplets import Triplets
from ..errors import ConfigError

AS_MADE = "as made"
"""float32 for our own adapters; for a PeftModel's layers what :func:`rankalloc.adopt` left each of them in."""


def checked(dtype: Any) -> torch.dtype | str | None:
    """``dtype``, when a :class:`Precision` can keep to it. Raises ConfigError otherwise."""
    if dtype is None or dtype == AS_MADE or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise ConfigError(f"dtype={dtype!r} is no number format to train in; use torch.float32, {AS_MADE!r} or None")


class Precision:
    """Keeps adapters in one number format.

    Args:
        adapters: as they are before a trainer is made.
        dtype: what they train in; :data:`AS_MADE`, or None for whatever a trainer makes of them.
    """

    def __init__(self, adapters: Adapters, dtype: torch.dtype | str | None) -> None:
        self.adapters = adapters
        self._dtypes = [_chosen(dtype, a, p) for a in adapters for p in a.own_parameters()]
        self._exact = [] if dtype is None else [
            (parameter, parameter.detach().clone()) for adapter in adapters for parameter in adapter.own_parameters()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Take a cast back: to the very numbers from before, where nothing else has changed them."""
        cast = [(p, exact) for p, exact in self._exact if p.dtype != exact.dtype and torch.equal(p, exact.to(p))]
        parameters = [parameter for adapter in self.adapters for parameter in adapter.own_parameters()]
        for parameter, dtype in zip(parameters, self._dtypes, strict=True):
            parameter.data = parameter.data.to(dtype or parameter.dtype)
        for parameter, exact in cast:
            parameter.copy_(exact)
        self._exact = []


def _chosen(dtype: torch.dtype | str | None, adapter: Triplets, parameter: nn.Parameter) -> torch.dtype | None:
    """What ``parameter`` trains in; None for whatever a trainer makes of it."""
    if isinstance(dtype, str):
        return torch.float32 if adapter.own_forward else parameter.dtype
    return dtype
