"""The control of a composition: an adapter of the same ranks and sizes that has learned nothing.

Its singular values in every layer are those of the adapter that it stands for, so ranks, ‖ΔW‖_F and what a budget cuts
are alike; its directions are orthonormal and drawn by chance (QR of a Gaussian matrix). A composition that is no better
than one with such a partner owes nothing to what the partner has learned.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch

from ..lowrank import Factors, decompose
from ..storage.reading import FinishedAdapter
from .truncation import SourceLayer


class RandomPartner:
    """Stands for ``adapter``; equal ``seed`` and layer names give equal directions."""

    def __init__(self, adapter: FinishedAdapter, seed: int) -> None:
        self.adapter, self.seed = adapter, seed
        self.layers: Mapping[str, SourceLayer] = adapter.layers

    def factors(self, name: str) -> Factors:
        """P (d_out, r) and Q (r, d_in) with orthonormal columns and rows, and the adapter's own singular values."""
        own = self.adapter.factors(name)
        sigma = decompose(own).sigma
        draw = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode("utf-8", "surrogatepass")))
        left, right = (
            torch.linalg.qr(torch.randn(side, len(sigma), generator=draw, dtype=torch.float64)).Q
            for side in (own.P.shape[0], own.Q.shape[1])
        )
        return Factors(left.to(own.P.dtype), right.T.to(own.Q.dtype), sigma)
