"""Training away from the subspaces of finished adapters, as a gradient that is added right before the optimizer's step.

    R = Σ over layers and triplets i of ‖Q_i V‖² / ‖Q_i‖²          V: orthonormal basis (d_in, k) of the others' rows
    ∂R/∂Q_i = 2 / ‖Q_i‖² · (Q_i V Vᵀ − s_i Q_i)                    s_i = ‖Q_i V‖² / ‖Q_i‖², a triplet's share inside

O-LoRA (Wang et al., 2023, arXiv 2310.14152) adds λ Σ_t ‖A_t A_newᵀ‖² to the loss, so that the new adapter reads what
the earlier ones do not; InfLoRA (Liang and Li, 2024, arXiv 2404.00228) forbids it by construction. Here A_t is replaced
by an orthonormal basis of its rows, and each new row is taken by its direction alone: the penalty depends neither on
how large the earlier factors were nor on how large the new ones are, and cannot be satisfied by making Q small and P
large. Each triplet feels its own share and no mean over all, so the force on it is the same at any rank and number of
layers, and does not grow while others are dropped. In canonical form R is the sum of cos² of the principal angles.

With ``side`` "output" the same is done to the columns of P, "both" does both. A row shorter than √1e-3 counts as that
long, since P begins at zero where LoRA does and the direction of nothing would be pulled with infinite force.

What measures triplets does not see it: the gradient is added after the scores have looked, so that a triplet is
not kept for being pushed (but with ``score_after_step`` they look later, as PEFT does). It acts whatever computes the
loss, and gradient accumulation does not multiply it.

Cost: four batched products of (r, d) by (d, k) for each shape of layer and step; d · k numbers a layer of memory, no
optimizer state. Known weakness: it is soft, so a task that needs an occupied direction takes it as far as the loss
pays for it; what is orthogonal in weights may still meet in activations, since the base's inputs are not white; and
bases weigh strong and weak directions alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..adapters.adapter_set import Adapters
from ..adapters.triplets import BOTTLENECK, TRAINED, Triplets
from ..errors import ConfigError, unknown
from ..options import number
from .subspaces import SIDES, Given, subspaces_of

WEIGHT = 0.1
_SHORT = 1e-3
"""‖Q_i‖² below which a row counts as this long."""

_FACTOR = {"input": "Q", "output": "P"}
OPTIONS = ("away_from", "away_weight", "away_side")
"""What a controller takes for it."""


class SubspacePenalty:
    """The penalty on ``adapters`` against the subspaces of ``away_from``; the formula is in the module docstring.

    Args:
        away_from: folders of adapters of the same base, or finished adapters.
        weight: of R; None for 0.1. R lies between 0 and the number of triplets.
        side: "input" (None too): keep out of what they read, which is O-LoRA's; "output": of what they write; "both".

    Raises:
        ConfigError: the adapters do not train the factor concerned; a value is out of its range; there is nothing to
            keep away from (see :func:`rankalloc.training.subspaces.subspaces_of`).
        AdapterFileError: an adapter is damaged or of another base.
    """

    def __init__(
        self, adapters: Adapters, away_from: Given | Sequence[Given], weight: float | None = None,
        side: str | None = None,
    ) -> None:
        self.adapters = adapters
        self.weight = WEIGHT if weight is None else number("away_weight", weight, ends=False)
        self.side = "input" if side is None else side
        if self.side not in SIDES:
            raise ConfigError(unknown("away_side", self.side, SIDES))
        if adapters.init == BOTTLENECK:
            raise ConfigError(
                "away_from keeps what an update reads and writes out of others' subspaces, and a bottleneck is no "
                "update of a weight; leave away_from out, or train a LoRA"
            )
        for which, factor in _FACTOR.items():
            if self.side in (which, "both") and factor not in TRAINED[adapters.init]:
                raise ConfigError(
                    f"away_from with away_side={self.side!r} turns {factor}, and init={adapters.init!r} leaves "
                    f"{factor} as it was drawn; attach with init='svd' or 'lora', or leave away_from out"
                )
        spaces = subspaces_of(adapters, away_from, self.side)
        self._spans = {"P": spaces.columns, "Q": spaces.rows}
        self.notes = spaces.notes
        self._digests = spaces.digests
        self._groups: list[tuple[str, list[Triplets], torch.Tensor]] = []
        self._shapes: Any = None

    def record(self) -> dict[str, Any]:
        """What a resumed run must have in common: the adapters by their files' hash, not by where they lie."""
        return {"away_from": [digest[:16] for digest in self._digests], "away_weight": self.weight,
                "away_side": self.side}

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add ``weight`` · ∂R/∂Q (and ∂R/∂P) to the gradients that exist; factors without one are left alone."""
        for factor, members, spans in self._grouped():
            have = [i for i, adapter in enumerate(members) if getattr(adapter, factor).grad is not None]
            if not have:
                continue
            if len(have) < len(members):
                members, spans = [members[i] for i in have], spans[have]
            rows, inside, size = _measured(factor, members, spans)
            energy = inside.square().sum(-1, keepdim=True)
            length = size.clamp_min(_SHORT)
            shares = torch.where(size > _SHORT, energy / length, 0.0)  # a row that counts as longer is not turned only
            gradient = (inside @ spans.mT - shares * rows) * (2 * self.weight / length)
            grads = [getattr(adapter, factor).grad for adapter in members]
            pieces = (gradient.mT if factor == "P" else gradient).to(grads[0].dtype)
            torch._foreach_add_(grads, list(pieces))

    @torch.no_grad()
    def share(self) -> float:
        """The mean share of a live triplet's row (and column) that lies inside the subspaces, 0…1."""
        shares = []
        for factor, members, spans in self._grouped():
            _, inside, size = _measured(factor, members, spans)
            kept = torch.stack([adapter.kept for adapter in members]) & (size[..., 0] > 0)
            shares.append((inside.square().sum(-1) / size[..., 0].clamp_min(1e-30))[kept].double().cpu())
        flat = torch.cat(shares) if shares else torch.zeros(0)
        return float(flat.mean()) if len(flat) else 0.0

    def _grouped(self) -> list[tuple[str, list[Triplets], torch.Tensor]]:
        """(factor, adapters of one shape, their bases (n, d, k)): as many operators as shapes, not as layers."""
        shapes = [(adapter.rank, adapter.Q.dtype, adapter.Q.device) for adapter in self.adapters]
        if shapes != self._shapes:  # ranks have left memory, or the model was moved
            alike: dict[Any, list[tuple[Triplets, torch.Tensor]]] = {}
            for factor, spans in self._spans.items():
                for name, span in spans.items():
                    adapter = self.adapters.modules[name]
                    if adapter.rank:
                        value = getattr(adapter, factor)
                        key = (factor, value.shape, span.shape, value.dtype, value.device)
                        alike.setdefault(key, []).append((adapter, span))
            self._groups = [
                (key[0], [adapter for adapter, _ in some],
                 torch.stack([span for _, span in some]).to(key[-1], torch.promote_types(torch.float32, key[-2])))
                for key, some in alike.items()
            ]
            self._shapes = shapes
        return self._groups


def _measured(
    factor: str, members: Sequence[Triplets], spans: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows (n, r, d), their coordinates inside the spans (n, r, k), and their ‖row‖² (n, r, 1)."""
    rows = torch.stack([adapter.P.T if factor == "P" else adapter.Q for adapter in members]).to(spans.dtype)
    return rows, rows @ spans, rows.square().sum(-1, keepdim=True)


def penalty_of(
    adapters: Adapters, away_from: Given | Sequence[Given] | SubspacePenalty | None = None,
    away_weight: float | None = None, away_side: str | None = None,
) -> SubspacePenalty | None:
    """The penalty that a controller's options ask for, one that was made before as it is; None for none.

    Raises:
        ConfigError: a weight or a side is given and nothing to keep away from.
    """
    if isinstance(away_from, SubspacePenalty):
        return away_from
    if away_from is None:
        for name, value in (("away_weight", away_weight), ("away_side", away_side)):
            if value is not None:
                raise ConfigError(f"{name}={value!r} does nothing without away_from; name the adapters to keep out of")
        return None
    return SubspacePenalty(adapters, away_from, away_weight, away_side)
