"""The updates of a mixture summed with one set of weights: the single adapter that it is when its gates are constant.

As in :mod:`.composing`, a weighted sum of low-rank updates is one low-rank update of the summed rank, exactly. Here the
weights may differ from layer to layer, and the factors are in a model, as matrices whatever the kind of the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.mixed import MixedLayer
from ..budget import RankBudget
from ..lowrank import Factors, concatenate, cut
from .side_by_side import side_by_side
from .truncation import SourceLayer, choose_from, spectra_of


@dataclass(frozen=True)
class Shape:
    """One layer of a source whose factors are matrices in memory."""

    d_in: int
    d_out: int
    dtype: torch.dtype = torch.float32
    ends: tuple[str, str] = ("lora_A.weight", "lora_B.weight")


class WeightedSum:
    """Σ_k g_k ΔW_k in every layer, as one source of factors.

    Args:
        layers: of a mixture.
        gates: {layer: (K,)}.
    """

    label = "the mixture"

    def __init__(self, layers: Mapping[str, MixedLayer], gates: Mapping[str, torch.Tensor]) -> None:
        self._layers, self._gates = layers, gates
        self.layers: dict[str, SourceLayer] = {name: Shape(layer.d_in, layer.d_out) for name, layer in layers.items()}

    def stored(self, name: str) -> Factors:
        """The factors of the weighted update of one layer, exactly."""
        updates = [on_cpu(update) for update in self._layers[name].updates()]
        return concatenate(list(zip(self._gates[name].tolist(), updates, strict=True)))


def as_adapters(
    layers: Mapping[str, MixedLayer], gates: Mapping[str, torch.Tensor], budget: RankBudget | None
) -> dict[str, Adapter]:
    """{layer: an adapter with its weighted update}, which no model holds.

    Args:
        gates: {layer: (K,)}.
        budget: what they may cost together; None keeps every rank that is more than rounding.

    Raises:
        BudgetError: the budget cannot be met.
        AdapterFileError: a weight is not finite.
    """
    total = WeightedSum(layers, gates)
    spectra = spectra_of(total)
    if budget is None:
        ranks = {name: spectrum.significant() for name, spectrum in spectra.items()}
    else:
        ranks = choose_from(total, spectra, budget).ranks

    def one(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return cut(total.stored(name), spectra[name], ranks[name], torch.float32)

    with side_by_side(one, layers) as pairs, torch.random.fork_rng():  # an adapter draws its first weights
        return {name: _adapter_of(layer.base_layer, *pairs(name)) for name, layer in layers.items()}


def on_cpu(factors: Factors) -> Factors:
    """``factors`` in float32 on the CPU."""
    lam = None if factors.lam is None else factors.lam.detach().cpu().float()
    return replace(factors, P=factors.P.detach().cpu().float(), Q=factors.Q.detach().cpu().float(), lam=lam)


@torch.no_grad()
def _adapter_of(base_layer: nn.Module, lora_a: torch.Tensor, lora_b: torch.Tensor) -> Adapter:
    adapter = Adapter(base_layer, len(lora_a), 1.0, init="lora")
    adapter.P.copy_(lora_b)
    adapter.Q.copy_(lora_a)
    return adapter
