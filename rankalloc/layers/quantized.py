"""Frozen layers whose weights are quantised: which can carry an adapter, and what their weights are in full.

As in QLoRA (arXiv 2305.14314), the base is stored in few bits and the adapter beside it in floating point. Forward and
backward passes are the layer's own; nothing here changes the packed weight.

    scheme     layer                                              weight
    4bit       bitsandbytes Linear4bit (NF4, FP4; also double)    uint8, packed two a byte, in blocks
    8bit       bitsandbytes Linear8bitLt (LLM.int8)               int8, one scale a row
    torchao    nn.Linear with a torchao weight (int8, int4)       a tensor subclass with dequantize()

A new scheme is one subclass of :class:`Scheme` and one entry in :data:`SCHEMES`. Layers are recognised by the names of
their classes, so that none of these libraries is needed for a model that does not use it. Weakness: GPTQ, AWQ and other
packings are unknown, and refused by name.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import nn

from ..errors import RankallocError


class Scheme(ABC):
    """One way to pack the weight of a linear layer."""

    name: str
    title: str
    """Its layers in the words of a message."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether the weight of ``module`` is packed in this way."""

    @abstractmethod
    def dequantized(self, module: Any) -> torch.Tensor:
        """The weight as a plain floating-point matrix, (d_out, d_in): a new tensor."""

    def unpacked_dtype(self, module: Any) -> torch.dtype | None:
        """The type of the weight before it was packed; None where :meth:`dequantized` returns that type already."""
        return None


class FourBit(Scheme):
    name = "4bit"
    title = "bitsandbytes' Linear4bit"

    def matches(self, module: nn.Module) -> bool:
        return _is_of_bitsandbytes(module, "Linear4bit")

    def dequantized(self, module: Any) -> torch.Tensor:
        weight = module.weight
        state = getattr(weight, "quant_state", None)
        if state is None:  # packed only when the layer is first moved to a device
            return weight.data.detach().clone()
        return _from_4_bits(weight.data, state).reshape(module.out_features, module.in_features)


class EightBit(Scheme):
    name = "8bit"
    title = "bitsandbytes' Linear8bitLt"

    def matches(self, module: nn.Module) -> bool:
        return _is_of_bitsandbytes(module, "Linear8bitLt")

    def dequantized(self, module: Any) -> torch.Tensor:
        weight = module.weight
        if weight.is_floating_point():
            return weight.data.detach().clone()
        # the scales move from the weight to the layer's state at its first forward pass
        scales = getattr(weight, "SCB", None)
        scales = module.state.SCB if scales is None else scales
        if scales is None:
            raise RankallocError("an 8-bit layer has no row scales (SCB), so its weight cannot be read; load it again")
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(weight.data, scales)

    def unpacked_dtype(self, module: Any) -> torch.dtype | None:
        bias = module.bias
        return bias.dtype if bias is not None and bias.is_floating_point() else torch.float32


class TorchAO(Scheme):
    name = "torchao"
    title = "torchao's weight-only Linear"

    def matches(self, module: nn.Module) -> bool:
        weight = getattr(module, "_parameters", {}).get("weight")
        plain_call = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        return plain_call and type(weight).__module__.split(".")[0] == "torchao" and hasattr(weight, "dequantize")

    def dequantized(self, module: Any) -> torch.Tensor:
        return module.weight.dequantize()


SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (FourBit(), EightBit(), TorchAO())}
"""The schemes by name."""

KNOWN = ", ".join(scheme.title for scheme in SCHEMES.values())


def scheme_of(module: nn.Module) -> str | None:
    """A key of :data:`SCHEMES` (see the module docstring); None for a layer that is not quantised, or unknown."""
    return next((scheme.name for scheme in SCHEMES.values() if scheme.matches(module)), None)


@torch.no_grad()
def dequantized(module: nn.Module) -> torch.Tensor:
    """The weight of a quantised layer as a plain floating-point matrix, (d_out, d_in): a new tensor.

    Raises:
        RankallocError: the layer is of no known scheme, or its packing cannot be read.
    """
    return SCHEMES[_require_scheme(module)].dequantized(module)


def plain_linear(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Linear:
    """An nn.Linear with the dequantised weight and the same bias, frozen.

    Args:
        dtype: of the weight; None for its type before it was packed if the layer knows it, else the bias's, else
            float32.
    """
    weight, linear = dequantized(module), cast(nn.Linear, module)
    dtype = dtype or SCHEMES[_require_scheme(module)].unpacked_dtype(module) or weight.dtype
    plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if linear.bias is not None:
        plain.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return plain.train(module.training)


def no_longer_quantized(model: nn.Module) -> None:
    """Tell a transformers model when its last quantised layer is gone, so that it is saved as a plain model."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not any(scheme_of(module) for module in model.modules()):
        quantizer.remove_quantization_config(model)


def let_trainer_train(model: nn.Module) -> None:
    """Let transformers' Trainer accept a quantised model that has our adapters.

    Trainer refuses every model with ``is_quantized`` set unless its class is one of PEFT's. Only Trainer and
    ``model.half()``/``model.float()`` read that flag; :func:`take_back` sets it again.
    """
    transformers_model: Any = model
    if getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is not None:
        transformers_model.is_quantized = False


def take_back(model: nn.Module) -> None:
    """Undo :func:`let_trainer_train`."""
    transformers_model: Any = model
    if getattr(model, "hf_quantizer", None) is not None and any(scheme_of(module) for module in model.modules()):
        transformers_model.is_quantized = True


def _require_scheme(module: nn.Module) -> str:
    scheme = scheme_of(module)
    if scheme is None:
        name = type(module).__name__
        raise RankallocError(f"{name} is quantised in a way this version does not know; known: {KNOWN}")
    return scheme


def _is_of_bitsandbytes(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.split(".")[0] == "bitsandbytes" for cls in type(module).__mro__)


def keep_packing(model: nn.Module) -> None:
    """Have the 4-bit layers of ``model`` keep the layout they have, so that evaluating them changes nothing.

    See :func:`_from_4_bits`: on such a CPU an evaluation would round the scales in the middle of a run, which a
    resumed run does not repeat; and a layer whose sides are not multiples of 32 and of the block fails.
    """
    for module in model.modules():
        if _is_of_bitsandbytes(module, "Linear4bit"):
            cast(Any, module).support_avx512bf16_for_cpu = False


def _from_4_bits(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """The matrix that bitsandbytes' layer multiplies by.

    On a CPU with AVX512-BF16 the first call of a layer in evaluation changes the layout of its weight for good: codes
    of 32 rows side by side, scales transposed and rounded to bfloat16. ``dequantize_4bit`` does not know that layout
    and would silently read other numbers.
    """
    from bitsandbytes import functional

    if getattr(state, "packing_format_for_cpu", False):
        asked = copy.copy(state)  # the conversion changes it, and would round its scales once more
        asked.original_nested = False
        packed, _ = functional._convert_weight_packed_for_cpu_inverse(packed, asked)
        state = functional.QuantState(
            absmax=state.absmax.T.reshape(-1).float(), shape=state.shape, code=state.code, blocksize=state.blocksize,
            quant_type=state.quant_type, dtype=state.original_dtype,
        )
    return functional.dequantize_4bit(packed, state)
