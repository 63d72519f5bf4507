"""Frozen layers whose weights are quantised: which ones can carry an adapter, and what their weights are in full.

QLoRA (arXiv 2305.14314): the base is stored in few bits, and the adapter beside it in floating point, as everywhere.
Forward and backward are the layer's own; nothing here touches the packed weight.

    scheme     layer                                              weight
    4bit       bitsandbytes Linear4bit (NF4, FP4; also double)    uint8, packed two a byte, in blocks
    8bit       bitsandbytes Linear8bitLt (LLM.int8)               int8, one scale a row
    torchao    nn.Linear with a torchao weight (int8, int4)       a tensor subclass with dequantize()

Layers are known by the names of their classes, so that none of these libraries is needed for a model that does not
use it. Weakness: GPTQ, AWQ and other packings are not known, and refused by name.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..errors import RankallocError

KNOWN = "bitsandbytes' Linear4bit and Linear8bitLt, and torchao's weight-only Linear"
_BITSANDBYTES = {"Linear4bit": "4bit", "Linear8bitLt": "8bit"}


def scheme_of(module: nn.Module) -> str | None:
    """ "4bit", "8bit" or "torchao" (see the module docstring); None for every other layer."""
    for cls in type(module).__mro__:
        if cls.__module__.split(".")[0] == "bitsandbytes" and cls.__name__ in _BITSANDBYTES:
            return _BITSANDBYTES[cls.__name__]
    weight = getattr(module, "_parameters", {}).get("weight")
    plain_call = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if plain_call and type(weight).__module__.split(".")[0] == "torchao" and hasattr(weight, "dequantize"):
        return "torchao"
    return None


@torch.no_grad()
def dequantized(module: nn.Module) -> torch.Tensor:
    """The weight of a quantised layer as a plain floating-point matrix, (d_out, d_in): a new tensor.

    Raises:
        RankallocError: the layer is of no known scheme, or its packing cannot be read.
    """
    scheme, weight = scheme_of(module), module.weight
    if scheme == "torchao":
        return weight.dequantize()
    if scheme == "4bit":
        state = getattr(weight, "quant_state", None)
        if state is None:  # packed only when the layer is first moved to a device
            return weight.data.detach().clone()
        return _from_4_bits(weight.data, state).reshape(module.out_features, module.in_features)
    if scheme == "8bit":
        if weight.is_floating_point():
            return weight.data.detach().clone()
        # the scales move from the weight to the layer's state at its first forward pass
        scales = getattr(weight, "SCB", None)
        scales = module.state.SCB if scales is None else scales
        if scales is None:
            raise RankallocError("an 8-bit layer has no row scales (SCB), so its weight cannot be read; load it again")
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(weight.data, scales)
    raise RankallocError(f"{type(module).__name__} is quantised in a way this version does not know; known: {KNOWN}")


def _from_4_bits(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """What bitsandbytes' layer multiplies by.

    On a CPU with AVX512-BF16 a layer's first call in evaluation lays its weight out anew, for good: codes of 32 rows
    beside one another, scales turned round and rounded to bfloat16. ``dequantize_4bit`` does not know that layout,
    and would read other numbers without a word.
    """
    from bitsandbytes import functional

    if getattr(state, "packing_format_for_cpu", False):
        asked = copy.copy(state)  # which the way back changes, and whose scales it would round once more
        asked.original_nested = False
        packed, _ = functional._convert_weight_packed_for_cpu_inverse(packed, asked)
        state = functional.QuantState(
            absmax=state.absmax.T.reshape(-1).float(), shape=state.shape, code=state.code, blocksize=state.blocksize,
            quant_type=state.quant_type, dtype=state.original_dtype,
        )
    return functional.dequantize_4bit(packed, state)


def plain_linear(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Linear:
    """An nn.Linear with the de-quantised weight and the same bias, frozen.

    Args:
        dtype: of the weight; None for the type it had before it was packed where the layer knows it, else the bias's,
            else float32.
    """
    weight = dequantized(module)
    bias = module.bias
    if dtype is None and scheme_of(module) == "8bit":
        dtype = bias.dtype if bias is not None and bias.is_floating_point() else torch.float32
    linear = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype or weight.dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear.train(module.training)


def no_longer_quantized(model: nn.Module) -> None:
    """Tell a transformers model that its last quantised layer is gone, so that it is saved as a plain one."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not any(scheme_of(module) for module in model.modules()):
        quantizer.remove_quantization_config(model)


def let_trainer_train(model: nn.Module) -> None:
    """Let transformers' Trainer take a quantised model that has our adapters.

    It refuses every model with ``is_quantized`` set unless it is of PEFT's own classes. Only Trainer and
    ``model.half()``/``model.float()`` read that flag; :func:`take_back` sets it again.
    """
    if getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is not None:
        model.is_quantized = False


def take_back(model: nn.Module) -> None:
    """Undo :func:`let_trainer_train`."""
    if getattr(model, "hf_quantizer", None) is not None and any(scheme_of(module) for module in model.modules()):
        model.is_quantized = True

