"""State with one number for each number of the parameter: torch's own optimizers, and bitsandbytes' for small tensors.

First moments follow a change of basis as the gradient does. Squared gradients follow with the squared coefficients, as
if entries were uncorrelated.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ..triplets import selected
from .base import Entry, Format, Turn, Verb, multiplied

Moment = Literal["first", "second"]

_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq", "variance")
# what state1 and state2 are, by bitsandbytes' name of the update rule
_BITSANDBYTES: dict[str, dict[str, Moment]] = {
    "adam": {"state1": "first", "state2": "second"}, "lamb": {"state1": "first", "state2": "second"},
    "lion": {"state1": "first"}, "momentum": {"state1": "first"}, "lars": {"state1": "first"},
    "rmsprop": {"state1": "second"}, "adagrad": {"state1": "second"},
}


def moment_of(entry: Entry) -> Moment | None:
    """Which moment of the gradient the entry is; None when nothing says."""
    known = _BITSANDBYTES.get(getattr(entry.optimizer, "optimizer_name", ""), {}).get(entry.key)
    return known or ("first" if entry.key in _FIRST else "second" if entry.key in _SECOND else None)


class Elementwise(Format):
    """A tensor in the parameter's shape. One whose meaning is unknown can lose triplets but not turn."""

    def claims(self, entry: Entry) -> bool:
        return entry.has_parameter_shape

    def supports(self, verb: Verb, entry: Entry) -> bool:
        if verb == "turn":
            return moment_of(entry) is not None
        # a subclass (torchao's 8-bit and 4-bit states) packs several numbers into one
        return type(entry.value) in (torch.Tensor, nn.Parameter)

    def select(self, entry: Entry, index: torch.Tensor) -> dict[str, torch.Tensor]:
        return {entry.key: selected(entry.value, entry.dims, index)}

    def turned(self, entry: Entry, turn: Turn) -> dict[str, torch.Tensor]:
        old = entry.value.to(torch.promote_types(entry.value.dtype, torch.float32))
        return {entry.key: multiplied(entry, turn, moment_of(entry) == "second", old)}

    def forget(self, entry: Entry, triplets: torch.Tensor) -> None:
        entry.value[entry.along_triplets(triplets)] = 0
