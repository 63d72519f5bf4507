"""Which layers can be adapted, and as matrices of which shape.

The answers come from two registries: the kinds of layers in :mod:`rankalloc.layers.kinds`, and the ways to pack a
weight in :mod:`rankalloc.layers.quantized`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from .experts import stacked_weights
from .kinds import LAYER_KINDS, Kind
from .quantized import KNOWN, dequantized, scheme_of
from .sharding import is_sharded


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if words[1:] else "".join(words)


def supported() -> str:
    """The layers that can be adapted, in the words of a message."""
    return _listed([title for kind in LAYER_KINDS.values() for title in kind.titles])


def kind_of(module: nn.Module) -> str | None:
    """A key of :data:`rankalloc.layers.kinds.LAYER_KINDS` when the module can be adapted, else None."""
    kind = _kind(module)
    return None if kind is None or why_not(module) else kind.name


def why_not(module: nn.Module) -> str | None:
    """Why this module cannot be adapted, in a few words; None when it can."""
    own_reason = next((reason for kind in LAYER_KINDS.values() if (reason := kind.why_not(module))), None)
    if own_reason:
        return own_reason
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and is_sharded(weight):
        return "its weight is sharded over processes already; put adapters in before fully_shard"
    if is_quantized(module) and not scheme_of(module):
        return f"its weights are quantised ({name}) in a way that is not known here; known: {KNOWN}"
    if _kind(module) is not None:
        return None
    if stacked := stacked_weights(module):
        return (
            f"{name} keeps the weights of {len(getattr(module, stacked[0]))} experts stacked in one tensor; each is "
            f"adapted by the name of that parameter ({', '.join(stacked)})"
        )
    if isinstance(module, tuple(cls for kind in LAYER_KINDS.values() for cls in kind.types)):
        return f"{name} computes its output differently from the layer it is derived from"
    return f"{name} is not one of the layers that rankalloc adapts ({supported()})"


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear-like layer whose weight is not a plain floating-point matrix."""
    if scheme_of(module):
        return True
    kind = _kind(module)
    if not hasattr(module, "in_features") and kind is None:
        return False
    weight = getattr(module, "weight", None)
    if weight is None or callable(weight):  # torch.ao's quantized Linear has weight()
        return hasattr(module, "qweight") or callable(weight)
    dims = kind.weight_dims(module) if kind is not None else 2
    plain = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dim() == dims
    return not plain or type(weight) not in (nn.Parameter, torch.Tensor) or weight.element_size() < 2


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a supported layer's weight as a matrix; of a convolution d_in = in / groups · kernel."""
    if scheme_of(module):  # the packed weight has another shape
        linear = cast(nn.Linear, module)
        return linear.in_features, linear.out_features
    d_out, d_in = weight_view(module).shape
    return d_in, d_out


def weight_view(module: nn.Module) -> torch.Tensor:
    """The weight as (d_out, d_in), a view of the stored one wherever its strides allow one."""
    kind = _kind(module) or LAYER_KINDS["linear"]
    return kind.matrix(cast(torch.Tensor, module.weight).data)


def full_weight(module: nn.Module) -> torch.Tensor:
    """The weight as (d_out, d_in), for reading: a view, or a dequantised copy if the layer is quantised."""
    return dequantized(module) if scheme_of(module) else weight_view(module)


def _kind(module: nn.Module) -> Kind[Any] | None:
    return next((kind for kind in LAYER_KINDS.values() if kind.matches(module)), None)
