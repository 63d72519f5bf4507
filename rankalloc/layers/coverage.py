"""What becomes of each weight of a model: adapted, trained whole or left frozen, and why; and how much that covers.

The coverage is the share of linear weights that is adapted. A linear weight is one that inputs are multiplied by: that
of a linear layer (nn.Linear and what derives from it, transformers' Conv1D, a quantised layer), of a convolution with a
kernel of one, the packed one of nn.MultiheadAttention, the stacked ones of experts, and bare parameters of modules.
Embeddings, output heads, wider convolutions, what is trained whole, routers and gates with one output are not among
them, nor are bare parameters whose name says that they are a table to add or look up (positions, tokens, biases).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .adaptable import is_quantized, kind_of, shape_of, why_not
from .experts import ExpertMatrix, stacked_weights
from .out_of_reach import out_of_reach
from .routers import routers_in
from .targets import LM_HEAD_NAMES, output_embeddings

_WHEN_NAMED = "adapted if target_modules names it"
EMBEDDING = f"an embedding: {_WHEN_NAMED}"
TOKEN_HEAD = f"gives the scores over the vocabulary: {_WHEN_NAMED}"
CONVOLUTION = f"a convolution: {_WHEN_NAMED}"
EXPERTS = f"experts in one tensor: {_WHEN_NAMED}"
ROUTER = "a router or gate, which decides and does not compute"
BARE = "not a layer: {owner} holds it as a parameter of its own"
PACKED = "packed: nn.MultiheadAttention keeps the weights of queries, keys and values in one tensor"


@dataclass(frozen=True)
class Weight:
    """One weight of at least two dimensions.

    Attributes:
        name: of its layer; of the parameter itself where that is not a layer's ``weight``.
        shape: (d_in, d_out) of a layer that can be adapted, else as it is stored.
        numbers: how many numbers it holds.
        fate: "adapted", "whole" (trained and saved whole) or "frozen".
        why: why it is frozen, in a few words; else empty.
        linear: whether it counts for the coverage.
    """

    name: str
    shape: tuple[int, ...]
    numbers: int
    fate: str
    why: str
    linear: bool

_TABLE = re.compile("position|embed|token|bias|table|probe|codevector|mask|scale|_log$|^D$", re.IGNORECASE)


def weights_of(model: nn.Module, found: Mapping[str, nn.Module], heads: Sequence[str]) -> list[Weight]:
    """Every weight of at least two dimensions, in the model's order; a weight that several layers share, once.

    Args:
        found: the layers that are adapted, by name (:func:`rankalloc.layers.targets.find_targets`).
        heads: names of the modules that are trained whole.
    """
    adapted = {
        (id(module.owner), module.parameter) if isinstance(module, ExpertMatrix) else (id(module), "weight")
        for module in found.values()
    }
    tokens = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    passed_by = out_of_reach(model)
    routers = {id(module) for module in routers_in(model).values()}
    output = output_embeddings(model)
    seen: set[int] = set()
    weights = []
    for name, module, key, tensor in _stored(model):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        own = name if key == "weight" and name else f"{name}.{key}".lstrip(".")
        whole = any(name == head or name.startswith(f"{head}.") for head in heads)
        fate = "whole" if whole else "adapted" if (id(module), key) in adapted else "frozen"
        is_head = module is output or name.rpartition(".")[2] in LM_HEAD_NAMES
        if fate == "frozen" and (is_head or (id(tensor) in tokens and not isinstance(module, nn.Embedding))):
            why, linear = TOKEN_HEAD, False
        else:
            why, linear = (ROUTER, False) if id(module) in routers else _why(module, key, passed_by)
        shape = shape_of(module) if key == "weight" and kind_of(module) else tuple(tensor.shape)
        frozen = fate == "frozen"
        weights.append(Weight(own, shape, math.prod(shape), fate, why if frozen else "", linear and not whole))
    return weights


def coverage(weights: Collection[Weight]) -> float | None:
    """The share of linear weights that is adapted, from 0 to 1; None when the model has none."""
    linear = sum(w.numbers for w in weights if w.linear)
    return sum(w.numbers for w in weights if w.linear and w.fate == "adapted") / linear if linear else None


def little_covered(model: nn.Module, found: Mapping[str, nn.Module], heads: Sequence[str]) -> list[str]:
    """What a run says when less than half of the linear weights is adapted, in one sentence; else nothing."""
    weights = weights_of(model, found, heads)
    share = coverage(weights)
    if share is None or share >= 0.5:
        return []
    left = next(weight for weight in weights if weight.linear and weight.fate == "frozen")
    return [
        f"only {100 * share:.0f} % of this model's linear weights are adapted ({left.name} is the first that is not: "
        f"{left.why}); rankalloc ls targets lists them"
    ]


def _stored(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """(name of the module, module, name of the parameter in it, parameter); vectors, whatever their shape, apart. A
    parameter that a weight is computed from (:mod:`torch.nn.utils.parametrize`) stands for that weight."""
    for name, module in model.named_modules():
        for key, tensor in module.named_parameters(recurse=False):
            if not (sum(side > 1 for side in tensor.shape) > 1 or (key == "weight" and is_quantized(module))):
                continue
            if isinstance(module, ParametrizationList):
                layer, _, computed = name.rpartition(".parametrizations.")
                yield layer, model.get_submodule(layer), computed, tensor
            else:
                yield name, module, key, tensor


def _why(module: nn.Module, key: str, passed_by: Mapping[int, str]) -> tuple[str, bool]:
    """(why this weight stays frozen, whether it is a linear one)."""
    kind = kind_of(module) if key == "weight" else None
    unreached = passed_by.get(id(module)) if key == "weight" else None
    if isinstance(module, nn.Embedding) or kind == "embedding":
        return unreached or why_not(module) or EMBEDDING, False
    if isinstance(module, nn.modules.conv._ConvNd):
        return unreached or why_not(module) or CONVOLUTION, math.prod(module.kernel_size) == 1
    if key in stacked_weights(module):
        return EXPERTS, True
    if isinstance(module, nn.MultiheadAttention) and "proj_weight" in key:
        return PACKED, True
    if key == "weight" and _decides(module):
        return ROUTER, False
    if kind or (key == "weight" and (isinstance(module, nn.Linear) or is_quantized(module))):
        return unreached or why_not(module) or "", True
    return BARE.format(owner=type(module).__name__), not _TABLE.search(key)


def _decides(module: nn.Module) -> bool:
    """Whether a module of its own class chooses experts."""
    return any(word in type(module).__name__.lower() for word in ("router", "gate"))
