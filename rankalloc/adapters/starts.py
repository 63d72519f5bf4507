"""The frozen pairs that some parametrisations begin with: of one draw for all layers, or of each layer's weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..layers.adaptable import shape_of
from .lora_xs import singular_pair
from .vera import shared_pair

Pair = tuple[torch.Tensor, torch.Tensor]
"""A (rank, d_in) or larger, and B (d_out, rank) or larger."""

OWN_START = {
    "vera": "the same random ones in every layer",
    "lora-xs": "singular vectors of each layer's weight",
}
"""{init: the frozen P and Q that it cannot do without, in the words of a message}."""


def pairs_of(layers: Mapping[str, tuple[nn.Module, int]], init: str) -> dict[str, Pair]:
    """{name: pair} of the layers, given as {name: (layer, rank)}; {} where ``init`` has none.

    Random values come from torch's global generator. Raises RankallocError when a weight has no singular vectors.
    """
    if init == "vera":
        pair = shared_pair([shape_of(layer) for layer, _ in layers.values()], max(rank for _, rank in layers.values()))
        return dict.fromkeys(layers, pair)
    if init == "lora-xs":
        return {name: _narrow(singular_pair(layer, rank, name)) for name, (layer, rank) in layers.items()}
    return {}


def _narrow(pair: Pair) -> Pair:
    return pair[0].float(), pair[1].float()
