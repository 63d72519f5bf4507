"""A layer of a mixture: a frozen layer and the updates of several finished adapters, weighed for each input.

    y = base(x) + Σ_k g_k(x) · P_k Λ_k Q_k x

The triplets of all adapters lie side by side, those of adapter 0 first, so a linear layer multiplies twice however many
adapters there are, [P_1 … P_K] · (Λ ⊙ g) · [Q_1; …; Q_K] x: the gates weigh the r numbers between the two products. A
mixture of total rank R costs what one adapter of rank R costs, and its gates K · d numbers a layer.

A task head that each adapter trained whole is mixed alike, y = Σ_k g_k(x) · (W_k x + b_k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from ..layers.adaptable import kind_of, shape_of
from ..layers.kinds import LAYER_KINDS, LINEAR, Kind
from ..lowrank import Factors
from .gates import Gate, ModelGate


class Gated(nn.Module):
    """A layer whose adapters are weighed by a gate of its own or by the model's.

    Attributes:
        base_layer: the layer that it is in the place of.
        gate: its own; None where the model's is asked.
        seen: called with the gates of every call, (…, K), while someone looks at them.
    """

    base_layer: nn.Module
    gate: Gate | None

    def __init__(self, base_layer: nn.Module, name: str, own: Gate | None, shared: ModelGate | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.gate = own
        self.name = name
        # in a list, so that the model's gate is not counted as a part of every layer
        self._shared = [shared] if shared is not None else []
        self.seen: Callable[[torch.Tensor], None] | None = None

    def __getattr__(self, name: str) -> Any:
        # what other code reads from the layer it thinks it has
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self._modules.get("base_layer")
            if base is None:
                raise
            return getattr(base, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": None}

    def gates(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """(…, K): of the layer's ``features`` (…, d), or those of the model for an input x (…, d)."""
        gates = self.gate(features) if self.gate is not None else self._shared[0].gates_for(x, self.name)
        if self.seen is not None:
            self.seen(gates.detach())
        return gates

    def gate_of(self) -> Gate:
        """The gate that weighs its adapters."""
        return self.gate if self.gate is not None else self._shared[0].gate


class MixedLayer(Gated):
    """A frozen layer with the updates of K adapters.

    Args:
        base_layer: the layer; not copied.
        name: of the layer in its model, for messages.
        updates: one for each adapter; rank 0 for one that leaves this layer alone.
        own, shared: the gate: of this layer, over :func:`gate_width` features, or of the model.
        dtype: of P, lam and Q, the triplets of all adapters side by side.
    """

    P: nn.Parameter
    lam: nn.Parameter
    Q: nn.Parameter

    def __init__(
        self, base_layer: nn.Module, name: str, updates: Sequence[Factors], own: Gate | None, shared: ModelGate | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base_layer, name, own, shared)
        self.kind = kind_of(base_layer) or "linear"
        self.layout: Kind = LAYER_KINDS[self.kind]
        self.d_in, self.d_out = shape_of(base_layer)
        self.ranks = tuple(update.rank for update in updates)
        place: dict[str, Any] = {"device": cast(torch.Tensor, base_layer.weight).device, "dtype": dtype}
        lam = [torch.ones(u.rank) if u.lam is None else u.lam.float() for u in updates]
        parts = {
            "P": torch.cat([u.P.to(**place) for u in updates], 1),
            # the same product as in a layer of one adapter, so the same numbers
            "lam": torch.cat([value.to(**place) * u.scaling for value, u in zip(lam, updates, strict=True)]),
            "Q": torch.cat([u.Q.to(**place) for u in updates]),
        }
        for part, value in parts.items():
            self.register_parameter(part, nn.Parameter(value, requires_grad=False))
        self.train(base_layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(x)
        inputs = x
        if self.layout.takes_numbers and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.Q.dtype)
        if self.kind in LINEAR:
            z = F.linear(x, self.Q)
            z = z * self._spread(self.gates(inputs, inputs)).to(z.dtype)
            return out + F.linear(z, self.P * self.lam).to(out.dtype)
        gates, start = self.gates(*self._seen_by_gate(inputs, out)), 0
        for k, rank in enumerate(self.ranks):
            if rank:
                part = slice(start, start + rank)
                update = self.layout.update(self.base_layer, x, self.Q[part], self.P[:, part] * self.lam[part])
                out = out + (_over(gates[..., k], update, self.kind) * update).to(out.dtype)
            start += rank
        return out

    def _spread(self, gates: torch.Tensor) -> torch.Tensor:
        """(…, K) as (…, R): the gate of each triplet's adapter."""
        parts = [gates[..., k : k + 1].expand(*gates.shape[:-1], rank) for k, rank in enumerate(self.ranks) if rank]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _seen_by_gate(self, x: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What stands for the input of a layer that is not linear: an embedding's output; a convolution's channels,
        averaged over its places."""
        if not self.layout.takes_numbers:
            return out, out.detach()
        places = cast(Any, self.base_layer).weight.dim() - 2
        features = x.flatten(-places).mean(-1)
        return features, features

    def updates(self) -> list[Factors]:
        """The update of each adapter, with Λ in ``lam``."""
        found, start = [], 0
        for rank in self.ranks:
            part = slice(start, start + rank)
            found.append(Factors(self.P.detach()[:, part], self.Q.detach()[part], self.lam.detach()[part]))
            start += rank
        return found

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_out={self.d_out}, ranks={self.ranks}"


class MixedHead(Gated):
    """A linear layer of a task head, of which each of K adapters brought its own.

    Args:
        base_layer: the model's own layer.
        name: of the layer in its model, for messages.
        weights, biases: (K, d_out, d_in) and (K, d_out), or None without a bias.
        own, shared: the gate, as in :class:`MixedLayer`.
    """

    def __init__(
        self, base_layer: nn.Linear, name: str, weights: torch.Tensor, biases: torch.Tensor | None, own: Gate | None,
        shared: ModelGate | None,
    ) -> None:
        super().__init__(base_layer, name, own, shared)
        place: dict[str, Any] = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.weights = nn.Parameter(weights.to(**place), requires_grad=False)
        self.biases = None if biases is None else nn.Parameter(biases.to(**place), requires_grad=False)
        self.train(base_layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.gates(x, x)
        biases = [None] * len(self.weights) if self.biases is None else self.biases
        each = [F.linear(x, weight, bias) for weight, bias in zip(self.weights, biases, strict=True)]
        parts = [(gates[..., k : k + 1] * out).to(out.dtype) for k, out in enumerate(each)]
        return sum(parts[1:], parts[0])

    def linear(self, gates: torch.Tensor) -> nn.Linear:
        """The one layer that it is when its gates are always these (K,)."""
        d_out, d_in = self.weights.shape[1:]
        layer = nn.Linear(d_in, d_out, self.biases is not None)
        layer.to(self.weights.device, self.weights.dtype).requires_grad_(False)
        gates = gates.to(self.weights.device, torch.float64)
        layer.weight.copy_(torch.einsum("k,kij->ij", gates, self.weights.double()))
        if self.biases is not None:
            layer.bias.copy_(torch.einsum("k,ki->i", gates, self.biases.double()))
        return layer


def gate_width(base_layer: nn.Module) -> int:
    """How many features a gate of this layer's own looks at."""
    kind = kind_of(base_layer)
    if kind == "embedding":
        return cast(nn.Embedding, base_layer).embedding_dim
    if kind == "convolution":
        return cast(nn.Conv2d, base_layer).in_channels
    return shape_of(base_layer)[0]


def _over(gate: torch.Tensor, update: torch.Tensor, kind: str) -> torch.Tensor:
    """One adapter's gate (…) such that it broadcasts over its update: over the channels and places of a convolution's,
    over the last dimension of an embedding's."""
    missing = update.dim() - gate.dim()
    return gate.reshape(*gate.shape, *[1] * missing) if kind == "convolution" else gate[..., None]
