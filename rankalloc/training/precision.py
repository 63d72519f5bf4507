"""The number format that adapters train in, whatever a trainer has cast them to.

TRL casts every trainable parameter beside a quantised base to bfloat16 while a trainer is made: SFT, DPO and GRPO
alike, without a word. bfloat16 has eight bits for a number, so an optimizer's steps below a quarter of a percent are
lost, and so is as much of the update whenever the basis changes.
"""

from __future__ import annotations

import torch

from ..adapters.adapter_set import Adapters


class Precision:
    """Keeps adapters in one number format.

    Args:
        adapters: as they are before a trainer is made.
        dtype: what they train in; None for whatever a trainer makes of them.
    """

    def __init__(self, adapters: Adapters, dtype: torch.dtype | None) -> None:
        self.adapters, self.dtype = adapters, dtype
        self._exact = [] if dtype is None else [
            (parameter, parameter.detach().clone()) for adapter in adapters for parameter in adapter.own_parameters()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Take a cast back: to the very numbers from before, where nothing else has changed them."""
        if self.dtype is None:
            return
        cast = [(p, exact) for p, exact in self._exact if p.dtype != exact.dtype and torch.equal(p, exact.to(p))]
        self.adapters.train_in(self.dtype)
        for parameter, exact in cast:
            parameter.copy_(exact)
        self._exact = []
