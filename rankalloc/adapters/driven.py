"""A LoRA layer of PEFT's, seen as triplets: P is its B, Q its A, and Λ stays 1.

The layer keeps its forward pass, and everything that PEFT, transformers and TRL do with it goes on working: what
changes is the width of A and B, in place, so that optimizers and references held elsewhere stay valid. A layer that
loses all its ranks keeps its two parameters, with a width of 0, so that a saved optimizer finds its parameters in the
same order.
"""

from __future__ import annotations

import math
import uuid
import weakref
from typing import Any

import torch
from torch import nn

from ..layers.adaptable import kind_of
from ..layers.kinds import LAYER_KINDS
from .triplets import Triplets, replace_data

_ORIGINS = "rankalloc_origins"

COPIED_LAYERS: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Living layers that are copies of a driven one; :mod:`rankalloc.training.averages` looks for averages among them."""


class DrivenLayer(Triplets):
    """One adapter of one LoRA layer of PEFT's (``peft.tuners.lora.LoraLayer``).

    Args:
        layer: around a linear layer or an embedding; not copied.
        adapter_name: which of its adapters.

    Shapes: P is lora_B (d_out, r), Q is lora_A (r, d_in); of an embedding lora_embedding_B (dim, r) and
    lora_embedding_A (r, vocabulary).
    """

    own_forward = False

    def __init__(self, layer: Any, adapter_name: str) -> None:
        self.layer = layer
        self.adapter_name = adapter_name
        self.base_layer = layer.get_base_layer()
        self.layout = LAYER_KINDS[kind_of(self.base_layer) or "linear"]
        # where the parameters are, and not they: loading may replace them. PEFT's containers are slow to look in
        if adapter_name in layer.lora_A:
            self._a, self._b = (side[adapter_name]._parameters for side in (layer.lora_A, layer.lora_B))
            self._key = "weight"
        else:
            self._a, self._b = (side._parameters for side in (layer.lora_embedding_A, layer.lora_embedding_B))
            self._key = adapter_name
        self.lam_out = self.core = None
        self.init = "lora"
        self.exponent = 0.5 if layer.use_rslora.get(adapter_name) else 1.0
        self.drawn = 0
        self.d_out, self.d_in = self.P.shape[0], self.Q.shape[1]
        self.initial_rank = self.rank
        if not isinstance(origins_of(layer), _Origins):
            setattr(layer, _ORIGINS, _Origins(layer, origins_of(layer)))
        self.origin = origins_of(layer).setdefault(adapter_name, uuid.uuid4().hex)  # a copy of the layer has the same
        self._lam, self._kept = torch.empty(0), torch.empty(0, dtype=torch.bool)

    @property
    def P(self) -> nn.Parameter:
        return self._b[self._key]

    @property
    def Q(self) -> nn.Parameter:
        return self._a[self._key]

    @property
    def rank(self) -> int:
        return self.P.shape[1]

    @property
    def lam(self) -> torch.Tensor:
        """Ones, (r,)."""
        self._follow()
        return self._lam

    @property
    def kept(self) -> torch.Tensor:
        self._follow()
        return self._kept

    @kept.setter
    def kept(self, mask: torch.Tensor) -> None:
        self._kept = mask

    @property
    def scaling(self) -> float:
        return self.layer.scaling[self.adapter_name]

    @scaling.setter
    def scaling(self, value: float) -> None:
        self.layer.scaling[self.adapter_name] = value
        self.resized()

    @property
    def training(self) -> bool:  # type: ignore[override]  # PEFT's layer has it
        return self.layer.training

    def _follow(self) -> None:
        """Weights of another rank may have been loaded, or moved to another device, since the last look."""
        p = self.P
        if len(self._lam) != p.shape[1] or self._lam.device != p.device:
            same = len(self._kept) == p.shape[1]
            self._lam = torch.ones(p.shape[1], device=p.device)
            self._kept = self._kept.to(p.device) if same else torch.ones_like(self._lam, dtype=torch.bool)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in (self.P, self.Q) if parameter.requires_grad]

    def own_parameters(self) -> list[nn.Parameter]:
        return [self.P, self.Q]

    def resized(self) -> None:
        record_rank(self.layer, self.adapter_name)


class _Origins(dict[str, str]):
    """What :func:`origins_of` returns, as an attribute of ``layer``, which notices when the layer is copied."""

    def __init__(self, layer: nn.Module, origins: dict[str, str]) -> None:
        super().__init__(origins)
        self._layer = weakref.ref(layer)  # a cycle would keep a model's memory until the next collection

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, str]:
        copied = memo.get(id(self._layer()))
        if copied is None:  # the attribute alone is copied
            return dict(self)
        COPIED_LAYERS.add(copied)
        return _Origins(copied, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a pickled layer of PEFT's needs nothing of ours


def origins_of(layer: nn.Module) -> dict[str, str]:
    """{adapter name: what its view and those of the layer's copies have in common} of a layer that is driven."""
    return getattr(layer, _ORIGINS, {})


def factors_of(layer: Any, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """(A (r, d_in), B (d_out, r)) of a LoRA layer."""
    if adapter_name in layer.lora_A:
        return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]


@torch.no_grad()
def set_width(layer: Any, adapter_name: str, rank: int) -> None:
    """Give a LoRA layer the rank that weights about to be loaded have; contents are undefined then."""
    a, b = factors_of(layer, adapter_name)
    replace_data(a, a.data.new_empty(rank, a.shape[1]))
    replace_data(b, b.data.new_empty(b.shape[0], rank))
    record_rank(layer, adapter_name)


def record_rank(layer: Any, adapter_name: str) -> None:
    """Bring what a LoRA layer says of its rank up to date: r, alpha, and the widths of its two linear layers.

    PEFT computes the scaling anew from alpha and r now and then, so both change together. r stays at least 1: that
    computation divides by it.
    """
    rank = factors_of(layer, adapter_name)[0].shape[0]
    layer.r[adapter_name] = max(1, rank)
    layer.lora_alpha[adapter_name] = alpha_of(
        layer.scaling[adapter_name], max(1, rank), bool(layer.use_rslora.get(adapter_name))
    )
    if adapter_name in layer.lora_A:
        layer.lora_A[adapter_name].out_features = layer.lora_B[adapter_name].in_features = rank


def alpha_of(scaling: float, rank: int, rslora: bool) -> float:
    """The alpha with which PEFT computes exactly ``scaling`` at this rank, a whole number where it can be one."""
    divisor = math.sqrt(rank) if rslora else rank
    alpha = scaling * divisor
    near = (round(alpha), alpha, math.nextafter(alpha, 0.0), math.nextafter(alpha, math.inf))
    return next((value for value in near if value / divisor == scaling), alpha)
