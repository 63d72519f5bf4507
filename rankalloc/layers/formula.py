"""Whether a class derived from nn.Linear, with a forward pass of its own, still computes W x + b: seen by trying it.

Falcon's layers multiply and add in two steps; others scale their inputs or their weight, or return a pair. A layer is
called once, on two rows of numbers, when it is first asked about. On the meta device, where there are no numbers, a
small layer of its class is made and called instead.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

_seen: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_ROWS, _SMALL = 2, (4, 3)
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference, relative to the largest output; the layer may round sums in another order."""


def is_linear(module: nn.Linear) -> bool:
    """Whether ``module`` computes what nn.Linear would with its weight and bias, in training and in evaluation."""
    if module not in _seen:
        _seen[module] = _tried(module)
    return _seen[module]


@torch.no_grad()
def _tried(module: nn.Linear) -> bool:
    if type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
        return False
    was_training = module.training
    try:
        with torch.random.fork_rng(devices=[]):
            layer = _small(module) if module.weight.is_meta else module
            return all(_same(layer.train(mode)) for mode in (True, False))
    # a class that cannot be made or called like nn.Linear fails in whatever way its own code does
    except Exception:
        return False
    finally:
        module.train(was_training)


def _small(module: nn.Linear) -> nn.Linear:
    with torch.device("cpu"):
        return type(module)(*_SMALL, bias=module.bias is not None)


def _same(layer: nn.Linear) -> bool:
    weight = layer.weight
    x = torch.linspace(-1, 1, _ROWS * weight.shape[1], device=weight.device).sin()
    x = x.reshape(_ROWS, -1).to(weight.dtype)
    own, wanted = layer(x), F.linear(x, weight, layer.bias)
    if not isinstance(own, torch.Tensor) or own.shape != wanted.shape or own.dtype != wanted.dtype:
        return False
    most = _TOLERANCE.get(weight.dtype, 1e-4) * float(wanted.abs().max())
    return bool((own - wanted).abs().max() <= most)
