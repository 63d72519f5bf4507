"""bitsandbytes' 8-bit state: codes, so that what changes is de-quantised, changed and quantised again.

bitsandbytes calls its moments state1 and state2. For a parameter of 4096 numbers or more these are 8-bit codes: the
flattened tensor in blocks of 256, each scaled by its largest size (absmax1) and rounded to the nearest of 256 values
(qmap1), block-wise quantisation (arXiv 2110.02861, section 2). Neither a row nor a column of the parameter is a block.

Code 0 does not mean zero: qmap is sorted, and its first entry is about -0.993 where the moment has a sign.

Weakness: selecting and turning round a second time, by at most half a step of the code. Forgetting rounds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import RankallocError
from ..triplets import selected
from .base import Entry, Format, Turn, Verb, multiplied
from .elementwise import moment_of

_BLOCK = 256


class Packed(Format):
    """Codes in the parameter's shape, or the scales and the code book that belong to them."""

    def claims(self, entry: Entry) -> bool:
        return _is_packed(entry.state, entry.key) and entry.has_parameter_shape or _belongs_to_codes(entry)

    def supports(self, verb: Verb, entry: Entry) -> bool:
        return verb != "turn" or _belongs_to_codes(entry) or moment_of(entry) is not None

    def select(self, entry: Entry, index: torch.Tensor) -> dict[str, torch.Tensor]:
        if _belongs_to_codes(entry):
            return {}
        values = unpacked(entry.state, entry.key)
        return _packed(entry.state, entry.key, selected(values, entry.dims, index))

    def turned(self, entry: Entry, turn: Turn) -> dict[str, torch.Tensor]:
        if _belongs_to_codes(entry):
            return {}
        new = multiplied(entry, turn, moment_of(entry) == "second", unpacked(entry.state, entry.key))
        return _packed(entry.state, entry.key, new)

    def forget(self, entry: Entry, triplets: torch.Tensor) -> None:
        if not _belongs_to_codes(entry):
            code_of_zero = entry.state[f"qmap{entry.key[-1]}"].abs().argmin()
            entry.value[entry.along_triplets(triplets)] = code_of_zero.to(entry.value)


def _is_packed(state: Mapping[str, Any], key: str) -> bool:
    """Whether ``state[key]`` holds 8-bit codes."""
    return key in ("state1", "state2") and getattr(state.get(key), "dtype", None) is torch.uint8


def _belongs_to_codes(entry: Entry) -> bool:
    """Whether the entry is the scales or the code book of another one, which handles both."""
    return entry.key[:-1] in ("absmax", "qmap") and _is_packed(entry.state, f"state{entry.key[-1:]}")


def unpacked(state: Mapping[str, Any], key: str) -> torch.Tensor:
    """The numbers behind ``state[key]``, float32 in the parameter's shape.

    Raises:
        RankallocError: the scales are not one a block of 256.
    """
    codes, scales = state[key], state[f"absmax{key[-1]}"]
    if scales.shape != (-(-codes.numel() // _BLOCK),):
        raise RankallocError(
            f"an 8-bit optimizer state has {tuple(scales.shape)} scales for {codes.numel()} numbers, which is not the "
            "block-wise layout that rankalloc reads; use another optimizer or shrink=False"
        )
    values = state[f"qmap{key[-1]}"].to(codes.device)[codes.flatten().long()]
    return (values * scales.repeat_interleave(_BLOCK)[: codes.numel()]).reshape(codes.shape)


def _packed(state: Mapping[str, Any], key: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """``values`` as ``state`` keeps them: {key: codes, absmax key: scales}."""
    scales = f"absmax{key[-1]}"
    if not values.numel():
        return {key: values.to(torch.uint8), scales: state[scales].new_zeros(0)}
    from bitsandbytes.functional import quantize_blockwise

    code = state[f"qmap{key[-1]}"].to(values.device)
    codes, how = quantize_blockwise(values.float().contiguous(), code=code, blocksize=_BLOCK)
    return {key: codes.reshape(values.shape), scales: how.absmax.float()}
