"""Which layers can be adapted, and how their weights lie.

nn.Linear keeps its weight as (d_out, d_in), transformers' Conv1D as (d_in, d_out), and a quantised layer packs it
(:mod:`rankalloc.quantized`). Everything that depends on these differences is here.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .quantized import KNOWN, dequantized, scheme_of

SUPPORTED = "nn.Linear and transformers' Conv1D"


def kind_of(module: nn.Module) -> str | None:
    """ "linear" or "conv1d" when the module is one rankalloc adapts, else None."""
    return None if why_not(module) else _kind(module)


def why_not(module: nn.Module) -> str | None:
    """Why this module cannot be adapted, in a few words; None when it can."""
    kind = _kind(module)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this weight directly and would never call an adapter"
    if is_quantized(module) and not scheme_of(module):
        return f"its weights are quantised ({type(module).__name__}) in a way that is not known here; known: {KNOWN}"
    if kind is None:
        return f"{type(module).__name__} is neither {SUPPORTED.replace(' and ', ' nor ')}"
    return None


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear-like layer whose weight is no plain floating-point matrix."""
    if scheme_of(module):
        return True
    if not hasattr(module, "in_features") and _kind(module) is None:
        return False
    weight = getattr(module, "weight", None)
    if weight is None or callable(weight):  # torch.ao's quantized Linear has weight()
        return hasattr(module, "qweight") or callable(weight)
    plain = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dim() == 2
    return not plain or type(weight) not in (nn.Parameter, torch.Tensor) or weight.element_size() < 2


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a supported layer."""
    if scheme_of(module):  # the packed weight has a shape of its own
        return module.in_features, module.out_features
    rows, columns = module.weight.shape
    return (rows, columns) if _kind(module) == "conv1d" else (columns, rows)


def weight_view(module: nn.Module) -> torch.Tensor:
    """The weight as (d_out, d_in), a view of the stored one."""
    return module.weight.data.T if _kind(module) == "conv1d" else module.weight.data


def full_weight(module: nn.Module) -> torch.Tensor:
    """The weight as (d_out, d_in), to read: a view, or of a quantised layer a de-quantised copy."""
    return dequantized(module) if scheme_of(module) else weight_view(module)


def _kind(module: nn.Module) -> str | None:
    if scheme_of(module) or (type(module).forward is nn.Linear.forward and isinstance(module, nn.Linear)):
        return "linear"
    # by name, so that torch alone is enough for models that are not from transformers
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "conv1d"
    return None
