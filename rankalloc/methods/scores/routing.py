"""Scores of experts weighed by how many tokens they get, after DR-LoRA (arXiv 2601.04823).

An expert that the router seldom chooses has a small part in the loss, but what gradients say of it at the moment does
not tell how seldom that is. With E experts, and f_e(t) the share of a step's tokens that its router sent to expert e,

    F_e ← β F_e + (1 − β) f_e(t),      score of a triplet of expert e ← E · F_e · score

so scores of experts and of other layers stay comparable: the mean of E·F over a block's experts is 1.

State: one number a triplet of an expert. Cost: one scatter of the router's choices a forward pass, and with several
processes an all-reduce of E numbers a block each step. Known weakness: an expert that gets few tokens now gets few
ranks to become useful later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ...adapters.triplets import Triplets
from ...layers.experts import ExpertMatrix, Traffic
from .base import Score

BETA = 0.85
"""Decay of the averaged shares."""


class Routed(Score):
    """Another score, times the share of tokens that a triplet's expert gets; the formula is in the module docstring.

    Args:
        inner: the score to weigh.
    """

    name = "routed"

    def __init__(self, adapters: Sequence[Triplets], inner: Score) -> None:
        super().__init__(adapters)
        self.inner = inner
        self.share: dict[int, torch.Tensor] = {}
        self._traffic: dict[int, tuple[Traffic, int]] = {}
        for index, adapter in enumerate(self.adapters):
            base = adapter.base_layer
            if isinstance(base, ExpertMatrix) and base.traffic is not None:
                self._traffic[index] = base.traffic, base.expert
                base.traffic.watched = True
                # every triplet of an expert has its share, so that what follows triplets follows this
                self.share[index] = torch.full_like(adapter.lam, 1 / base.traffic.experts, dtype=torch.float32)

    @torch.no_grad()
    def observe(self) -> None:
        self.inner.observe()
        shares = self._shares()
        for index, (traffic, expert) in self._traffic.items():
            now = shares.get(id(traffic))
            if now is not None:
                self.share[index].mul_(BETA).add_(now[expert].to(self.share[index].device), alpha=1 - BETA)

    def _shares(self) -> dict[int, torch.Tensor]:
        """{id of a module's traffic: (experts,) share of its tokens since the last step}."""
        counted = {id(traffic): traffic for traffic, _ in self._traffic.values() if traffic.counts is not None}
        counts = {key: traffic.counts for key, traffic in counted.items() if traffic.counts is not None}
        if counts and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for total in counts.values():
                dist.all_reduce(total)
        for traffic in counted.values():
            traffic.counts = None
        return {key: total / total.sum().clamp(min=1) for key, total in counts.items()}

    def values(self) -> Sequence[torch.Tensor]:
        values = list(self.inner.values())
        for index, share in self.share.items():
            values[index] = values[index] * share.to(values[index].dtype) * self._traffic[index][0].experts
        return values

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.inner.tensors() | {f"share.{index}.lam": share for index, share in self.share.items()}
