"""Which layers can be adapted, and as matrices of which shape; what differs from kind to kind is in
:mod:`rankalloc.layers.kinds`, and how a quantised layer packs its weight in :mod:`rankalloc.layers.quantized`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .kinds import KINDS
from .quantized import KNOWN, dequantized, scheme_of

SUPPORTED = "nn.Linear, transformers' Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d and nn.Conv3d"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def kind_of(module: nn.Module) -> str | None:
    """A key of :data:`rankalloc.layers.kinds.KINDS` when the module is one rankalloc adapts, else None."""
    return None if why_not(module) else _kind(module)


def why_not(module: nn.Module) -> str | None:
    """Why this module cannot be adapted, in a few words; None when it can."""
    kind = _kind(module)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this weight directly and would never call an adapter"
    if hasattr(getattr(module, "weight", None), "device_mesh"):
        return "its weight is sharded over processes already; put adapters in before fully_shard"
    if is_quantized(module) and not scheme_of(module):
        return f"its weights are quantised ({type(module).__name__}) in a way that is not known here; known: {KNOWN}"
    if kind is None:
        stacked = stacked_weights(module)
        if stacked:
            return (
                f"{type(module).__name__} keeps the weights of {len(getattr(module, stacked[0]))} experts stacked in "
                f"one tensor ({', '.join(stacked)}), and a triplet of such a stack is none of a matrix"
            )
        if isinstance(module, (nn.Embedding, *_CONVOLUTIONS)):
            return f"{type(module).__name__} computes its output in a way of its own"
        return f"{type(module).__name__} is none of {SUPPORTED}"
    if kind == "embedding" and module.max_norm is not None:
        return "an embedding with max_norm changes its own weight at each call, which an adapter cannot follow"
    return None


def stacked_weights(module: nn.Module) -> list[str]:
    """Names of the parameters in which this module keeps the matrices of several experts, (experts, …, …)."""
    is_experts = hasattr(module, "num_experts") or "expert" in type(module).__name__.lower()
    return [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3] if is_experts else []


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear-like layer whose weight is no plain floating-point matrix."""
    if scheme_of(module):
        return True
    if not hasattr(module, "in_features") and _kind(module) is None:
        return False
    dimensions = 2 if not isinstance(module, _CONVOLUTIONS) else len(module.kernel_size) + 2
    weight = getattr(module, "weight", None)
    if weight is None or callable(weight):  # torch.ao's quantized Linear has weight()
        return hasattr(module, "qweight") or callable(weight)
    plain = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dim() == dimensions
    return not plain or type(weight) not in (nn.Parameter, torch.Tensor) or weight.element_size() < 2


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a supported layer's weight as a matrix; of a convolution d_in = in / groups · kernel."""
    if scheme_of(module):  # the packed weight has a shape of its own
        return module.in_features, module.out_features
    d_out, d_in = weight_view(module).shape
    return d_in, d_out


def weight_view(module: nn.Module) -> torch.Tensor:
    """The weight as (d_out, d_in), a view of the stored one wherever its strides allow one."""
    return KINDS[_kind(module) or "linear"].matrix(module.weight.data)


def full_weight(module: nn.Module) -> torch.Tensor:
    """The weight as (d_out, d_in), to read: a view, or of a quantised layer a de-quantised copy."""
    return dequantized(module) if scheme_of(module) else weight_view(module)


def _kind(module: nn.Module) -> str | None:
    forward = type(module).forward
    if scheme_of(module) or (forward is nn.Linear.forward and isinstance(module, nn.Linear)):
        return "linear"
    # by name, so that torch alone is enough for models that are not from transformers
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "conv1d"
    if forward is nn.Embedding.forward and isinstance(module, nn.Embedding):
        return "embedding"
    for convolution in _CONVOLUTIONS:
        plain = forward is convolution.forward and type(module)._conv_forward is convolution._conv_forward
        if isinstance(module, convolution) and plain:
            return "convolution"
    return None
