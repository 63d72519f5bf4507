"""MatryoshkaLoRA: leading triplets with larger fixed scales, so that one run can be cut to any rank afterwards.

Modoranu, Safaryan and Alistarh, 2026 (arXiv 2605.07850; code IST-DASLab/MatryoshkaLoRA): every step trains the mixture
of the adapters of all ranks in S at once, which is one LoRA with a fixed diagonal between its factors:

    ΔW = (α / r) · 1/|S| Σ_{ρ∈S} s_ρ P[:, :ρ] Q[:ρ] = (α / r) · P diag(p) Q,      p_i = 1/|S| Σ_{ρ∈S, ρ≥i} s_ρ

with s_ρ = (r / ρ)^e, e = 0, 1, ½ for ``weights`` "one", "inverse", "root": the paper's 1, 1/ρ, 1/√ρ, such that s_r = 1.
This forward pass is the paper's, and S, the powers of two; there is one loss a step, that of the mixture, and no sum
of losses over ranks. Triplets beyond the last power of two would have p_i = 0 and never learn, so r itself is in S too.

A sum or a mean: the paper writes a sum, and its code has both. Here it is the mean. Where the loss is nearly linear in
ΔW, the loss at the mean of the adapters is the mean of their losses, which is what nesting wants (where it is convex, a
bound of that from below); a sum is an update |S| times as large as any of them.

What is used after training is ours. The paper takes P[:, :ρ] Q[:ρ] at s_ρ, which no step has trained, not even at r.
Here it is the mixture that was trained, and cut to b every member of it is cut to at most b:

    ΔW_b = (α / r) · P[:, :b] diag(p[:b]) Q[:b]          for every b

So the whole adapter is what the last step trained, whole, cut and cut again are one family, a plain file holds it with
p in lora_B, and layers may have unlike ranks. In a probe (a planted update of falling singular values in three layers,
r = 8, 150 steps, 3 seeds, rate 1e-2, mean square error, 0.024 without an update):

    rank                                          1        2        4        8
    this rule, weights "root"                     0.0178   0.0111   0.0037   0.0005
    the same run, used at s_ρ                     0.0167   0.0097   0.0068   0.0279
    a sum, used at s_ρ                            0.0221   0.0185   0.0128   0.0061
    plain LoRA, its first triplets                0.0204   0.0150   0.0071   0.0004
    plain LoRA, its largest singular triplets     0.0093   0.0035   0.0009   0.0004
    DyLoRA, scale="rslora"                        0.0061   0.0029   0.0011   0.0009

At the freeze each layer is cut to a rank of its own, from the end (:mod:`.nested`); p stays as it was, so that nothing
else changes.

Cost: none beside LoRA's. Known weakness: no step looks at a cut adapter, so the order comes from unlike rates alone. It
loses nothing at full rank, but at low ranks it is far from DyLoRA, and from an SVD of the same adapter (``cut="svd"``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...options import choice
from .nested import Nested

WEIGHTS = {"one": 0.0, "inverse": 1.0, "root": 0.5}
"""{``weights``: e of s_ρ = (r / ρ)^e}."""


def nested_ranks(rank: int) -> list[int]:
    """S: the powers of two up to ``rank``, and ``rank`` itself; rising."""
    return sorted({rank, *(2**k for k in range(rank.bit_length()))}) if rank else []


def diagonal(rank: int, weights: str = "root") -> torch.Tensor:
    """p of the module docstring, (rank,) in float64."""
    p = torch.zeros(rank, dtype=torch.float64)
    members = nested_ranks(rank)
    for member in members:
        p[:member] += (rank / member) ** WEIGHTS[weights] / len(members)
    return p


class Matryoshka(Nested):
    """Fixed scales that fall along the triplets; the formula is in the module docstring.

    Args:
        weights: "one", "inverse" or "root".
    """

    name = "matryoshka"
    nested_exponent = 0.0

    def __init__(self, *args: Any, weights: str = "root", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weights = choice("weights", weights, WEIGHTS)

    @torch.no_grad()
    def begin(self) -> None:
        for adapter in self.adapters:
            adapter.lam.copy_(diagonal(adapter.rank, self.weights))

    @torch.no_grad()
    def allocated(
        self, before: Sequence[torch.Tensor], step: int, optimizer: torch.optim.Optimizer | None
    ) -> None:
        for adapter in self.adapters:
            adapter.lam.mul_(adapter.kept)
