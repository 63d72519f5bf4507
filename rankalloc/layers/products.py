"""The library of torch that multiplies by a frozen weight: x Wᵀ and ∂y W, in float32 on the CPU.

torch computes these products with MKL, which is not tuned for AMD's processors. On an EPYC (Zen 5) oneDNN, which is
part of torch too, takes 0.4 to 0.5 × the time. These two products are nearly all of an adapted layer's work, so
:mod:`rankalloc.layers.fused` computes them with oneDNN on AMD's processors with AVX-512.

The choice depends on the processor and on shapes, never on a clock, so runs are repeatable to the bit.
``RANKALLOC_ONEDNN=0`` leaves all products to torch's choice; ``RANKALLOC_ONEDNN=1`` uses oneDNN on other processors
too.

Weakness: the operator is not public; torch's own compiler emits it. If it is missing, torch's choice is used. oneDNN
adds in a different order from MKL: runs with and without it differ by rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch

SWITCH = "RANKALLOC_ONEDNN"
# multiplications below which preparing oneDNN's call costs more than it saves
_SMALLEST = 2**21


@lru_cache(maxsize=1)
def uses_onednn() -> bool:
    """Whether this process computes large enough products with frozen weights by oneDNN."""
    wanted = os.environ.get(SWITCH)
    if wanted == "0" or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    wide = _capabilities().get("avx512_f", False)
    return wanted == "1" or wide and "AMD" in (processor() or "") and torch.backends.mkl.is_available()


def processor() -> str | None:
    """The CPU's name, such as "AMD EPYC"; None if torch does not know it."""
    return _capabilities().get("cpu_name") or None


def _capabilities() -> Mapping[str, Any]:
    # older versions of torch do not have this function
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def chosen(x: torch.Tensor, weights: Iterable[torch.Tensor]) -> bool:
    """Whether oneDNN multiplies x (..., d_in) by these weights (d_out, d_in)."""
    if not uses_onednn() or not x.is_cpu or x.dtype is not torch.float32 or not torch.backends.mkldnn.enabled:
        return False
    numbers = x.numel()
    return all([numbers * weight.shape[0] >= _SMALLEST for weight in weights])


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """rows (n, d) · weightᵀ + bias, weight (d_out, d) of any strides, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise.default(rows.contiguous(), weight, bias, "none", [], "")


def product_plus(rows: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """rows (n, d) · weightᵀ + other (n, d_out), a new tensor, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise.binary(rows.contiguous(), other, weight, None, "add")


class FrozenLinear(torch.autograd.Function):
    """x Wᵀ + b by oneDNN for frozen W and b, differentiable in x any number of times; x is not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return FrozenLinear.apply(grad, weight.t(), None), None, None
