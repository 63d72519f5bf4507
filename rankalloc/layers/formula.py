"""Whether a subclass of a layer still computes what the layer computes, found by trying it on tiny weights.

Falcon's linear layers write ``x @ W.T + b`` in their own forward pass, which is nn.Linear's formula; a scaled embedding
is not nn.Embedding's. The forward pass of the layer is run with a few random numbers in place of its weights, so the
answer costs microseconds for a layer of any size, on the meta device too. A layer with further parameters, buffers or
modules is never taken for a plain one: an update that is zero now, as that of another LoRA, may not stay so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

_ROWS, _IN, _OUT = 3, 5, 4
_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

Formula = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def computes(
    module: nn.Module, formula: Formula, weight_shape: tuple[int, int], inputs: torch.Tensor, **sizes: int
) -> bool:
    """Whether ``module`` computes ``formula(inputs, weight, bias)``, in training and in evaluation.

    Args:
        weight_shape: of the tiny weight.
        inputs: what the forward pass is given; numbers are cast to the weight's type.
        sizes: the attributes of the module that say how large it is, for the tiny weight.
    """
    if module not in _KNOWN:
        _KNOWN[module] = _tried(module, formula, weight_shape, inputs, sizes)
    return _KNOWN[module]


def _tried(
    module: nn.Module, formula: Formula, shape: tuple[int, int], inputs: torch.Tensor, sizes: dict[str, int]
) -> bool:
    own = set(module._parameters)
    weight = module._parameters.get("weight")
    if own - {"weight", "bias"} or module._buffers or module._modules or weight is None:
        return False
    generator = torch.Generator().manual_seed(0)
    dtypes = {torch.float32, weight.dtype} if weight.is_floating_point() and weight.element_size() > 1 else set()
    for dtype in dtypes:
        tiny: Any = copy.copy(module)
        tiny.__dict__ |= sizes
        tiny._parameters = {
            key: None if value is None else nn.Parameter(
                torch.randn(shape if key == "weight" else (_OUT,), generator=generator).to(dtype), requires_grad=False
            ) for key, value in module._parameters.items()
        }
        given = inputs.to(dtype) if inputs.is_floating_point() else inputs
        expected = formula(given, tiny.weight, tiny._parameters.get("bias"))
        for training in (True, False):
            tiny.training = training
            try:
                found = type(module).forward(tiny, given)
            except Exception:  # whatever its own code trips over on other sizes: it is not the plain formula
                return False
            if not isinstance(found, torch.Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
                return False
            if not torch.allclose(found.float(), expected.float(), rtol=1e-2 if dtype.itemsize < 4 else 1e-5):
                return False
    return bool(dtypes)


def numbers() -> torch.Tensor:
    """(rows, in) inputs of a linear layer, some of them large."""
    return 10 * torch.randn(_ROWS, _IN, generator=torch.Generator().manual_seed(1))


def is_linear(module: nn.Module) -> bool:
    """Whether a subclass of nn.Linear computes x Wᵀ + b."""
    sizes = {"in_features": _IN, "out_features": _OUT}
    return computes(module, nn.functional.linear, (_OUT, _IN), numbers(), **sizes)


def is_lookup(module: nn.Module) -> bool:
    """Whether a subclass of nn.Embedding returns rows of its weight as they are."""
    rows = torch.tensor([[0, 2], [1, _OUT - 1]])
    sizes = {"num_embeddings": _OUT, "embedding_dim": _IN}
    return computes(module, lambda ids, weight, _: weight[ids], (_OUT, _IN), rows, **sizes)
