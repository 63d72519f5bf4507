"""The memory of bitsandbytes' optimizers, so that ranks can be removed from it and turned to another basis.

They call what they remember state1 and state2. For a parameter of 4096 numbers or more these are 8-bit codes: the
flattened tensor in blocks of 256, each scaled by its largest size (absmax1) and rounded to the nearest of 256 values
(qmap1), block-wise quantisation (arXiv 2110.02861, section 2). Neither a row nor a column is a block, so what changes
is de-quantised, changed and quantised again. Weakness: that rounds a second time, by at most half a step of the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import RankallocError

_BLOCK = 256
# what state1 and state2 are, by bitsandbytes' name of the update rule
_MEANING = {
    "adam": {"state1": "first", "state2": "second"}, "lamb": {"state1": "first", "state2": "second"},
    "lion": {"state1": "first"}, "momentum": {"state1": "first"}, "lars": {"state1": "first"},
    "rmsprop": {"state1": "second"}, "adagrad": {"state1": "second"},
}


def is_packed(state: Mapping[str, Any], key: str) -> bool:
    """Whether ``state[key]`` holds 8-bit codes."""
    return key in ("state1", "state2") and getattr(state.get(key), "dtype", None) is torch.uint8


def belongs_to_packed(state: Mapping[str, Any], key: str) -> bool:
    """Whether ``key`` is the scales or the code of another key that is packed."""
    return key[:-1] in ("absmax", "qmap") and is_packed(state, f"state{key[-1:]}")


def meaning(optimizer: torch.optim.Optimizer, key: str) -> str | None:
    """ "first" or "second" when ``key`` is bitsandbytes' name for a moment of that order, else None."""
    return _MEANING.get(getattr(optimizer, "optimizer_name", ""), {}).get(key)


def unpacked(state: Mapping[str, Any], key: str) -> torch.Tensor:
    """The numbers behind ``state[key]``, float32 in the parameter's shape."""
    codes, scales = state[key], state[f"absmax{key[-1]}"]
    if scales.shape != (-(-codes.numel() // _BLOCK),):
        raise RankallocError(
            f"an 8-bit optimizer state has {tuple(scales.shape)} scales for {codes.numel()} numbers, which is not the "
            "block-wise layout that rankalloc reads; use another optimizer or shrink=False"
        )
    values = state[f"qmap{key[-1]}"].to(codes.device)[codes.flatten().long()]
    return (values * scales.repeat_interleave(_BLOCK)[: codes.numel()]).reshape(codes.shape)


def packed(state: Mapping[str, Any], key: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """``values`` as ``state`` keeps them: {key: codes, absmax key: scales}."""
    scales = f"absmax{key[-1]}"
    if not values.numel():
        return {key: values.to(torch.uint8), scales: state[scales].new_zeros(0)}
    from bitsandbytes.functional import quantize_blockwise

    code = state[f"qmap{key[-1]}"].to(values.device)
    codes, how = quantize_blockwise(values.float().contiguous(), code=code, blocksize=_BLOCK)
    return {key: codes.reshape(values.shape), scales: how.absmax.float()}
