"""The adapters of many runs: for every layer P (K, d_out, R), λ (K, R) and Q (K, R, d_in), with what AdamW remembers.

A run's triplets in memory are the first ``held[k, layer]`` of R. Behind them P, Q (and so the update), their moments
and averages are zero, and stay so: a triplet whose P and Q are zero has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rankalloc.budget import LayerShape

NAMES = ("P", "lam", "Q")
TRAINED = {"svd": NAMES, "lora": ("P", "Q")}
"""{init: the factors that are trained}, of P·Λ·Q and of B·A."""


class Factors:
    """P, Λ and Q of K runs beside N layers, and the first and second moments of their gradients.

    Attributes:
        held: (K, N), triplets in memory.
        kept: (K, N, R) bool, those that the last allocation kept.
        widths: the most triplets that any run holds, by layer.
        first, second: {factor: a moment for each layer}.
        averages: {what: (K, N, R)}, moving averages that a score is made of.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], start: dict[str, list[torch.Tensor]], held: torch.Tensor, init: str,
        scaling: float,
    ) -> None:
        self.shapes, self.init, self.scaling = tuple(shapes), init, scaling
        self.P, self.lam, self.Q = (start[name] for name in NAMES)
        self.rank = self.lam[0].shape[1]
        self.held = held
        self.kept = self._inside()
        self.first, self.second = ({n: [torch.zeros_like(t) for t in self.of(n)] for n in NAMES} for _ in range(2))
        self.averages: dict[str, torch.Tensor] = {}
        for layer in range(len(self.shapes)):
            inside = self.kept[:, layer]
            for name in NAMES:
                self.of(name)[layer].mul_(self.along(name, inside))
        self._count()

    def of(self, name: str) -> list[torch.Tensor]:
        """A factor of every layer."""
        return getattr(self, name)

    @staticmethod
    def along(name: str, values: torch.Tensor) -> torch.Tensor:
        """Numbers of triplets (K, R), shaped to be multiplied with a factor."""
        return values[:, None] if name == "P" else values[:, :, None] if name == "Q" else values

    def trained(self) -> list[tuple[str, int]]:
        """(factor, layer) of everything that has a gradient."""
        return [(name, layer) for name in TRAINED[self.init] for layer, width in enumerate(self.widths) if width]

    def sizes(self) -> torch.Tensor:
        """The size of each triplet, (K, N, R): |λ|, or ‖P_i‖‖Q_i‖ where Λ stays 1."""
        if self.init == "svd":
            return torch.stack([lam.detach().abs() for lam in self.lam], 1)
        return torch.stack([
            p.detach().norm(dim=1) * q.detach().norm(dim=2) for p, q in zip(self.P, self.Q, strict=True)
        ], 1)  # fmt: skip

    @torch.no_grad()
    def drop(self, runs: torch.Tensor, kept: torch.Tensor) -> None:
        """Take what ``kept`` (k, N, R) leaves out of the updates of ``runs`` (k,): its λ, or its column of P, becomes
        zero."""
        self.kept[runs] = kept
        name = "lam" if self.init == "svd" else "P"
        for layer, factor in enumerate(self.of(name)):
            factor.data[runs] *= self.along(name, kept[:, layer])

    @torch.no_grad()
    def select(self, runs: torch.Tensor, stays: torch.Tensor) -> None:
        """Hold only the triplets ``stays`` (k, N, R) of ``runs`` (k,), in their order; the others leave memory."""
        order = torch.argsort(~stays, dim=2, stable=True)
        counts = stays.sum(2)
        inside = torch.arange(self.rank, device=counts.device) < counts[:, :, None]
        self.held[runs] = counts
        self.kept[runs] = self.kept[runs].gather(2, order) & inside
        for average in self.averages.values():
            average[runs] = average[runs].gather(2, order) * inside
        for layer in range(len(self.shapes)):
            for name in NAMES:
                places, own = self.along(name, order[:, layer]), self.along(name, inside[:, layer])
                for tensors in (self.of(name), self.first[name], self.second[name]):
                    tensor = tensors[layer].data
                    old = tensor[runs]
                    tensor[runs] = old.gather(2 if name == "P" else 1, places.expand_as(old)) * own
        self._count()

    @torch.no_grad()
    def renew(self, run: int, start: dict[str, list[torch.Tensor]]) -> None:
        """Give a run new factors, (1, …) each, where it holds a triplet, and forget its moments."""
        for layer in range(len(self.shapes)):
            inside = torch.arange(self.rank, device=self.held.device) < self.held[run, layer]
            for name in NAMES:
                self.of(name)[layer].data[run] = (start[name][layer] * self.along(name, inside[None]))[0]
                self.first[name][layer][run] = 0
                self.second[name][layer][run] = 0

    def _inside(self) -> torch.Tensor:
        return torch.arange(self.rank, device=self.held.device) < self.held[:, :, None]

    def _count(self) -> None:
        self.widths = self.held.amax(0).tolist()
