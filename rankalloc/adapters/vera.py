"""VeRA's frozen pair: the same random P and Q in every layer, of which only vectors are trained.

Kopiczko et al., ICLR 2024 (arXiv 2310.11454): ΔW = s · diag(lam_out) P Λ Q. P and Q are drawn once and frozen;
trained are lam (r,), which begins at 0.1, and lam_out (d_out,), which begins at zero, so that ΔW = 0. The paper has no
s: attach with alpha = rank for that.

Which ranks matter shows in lam, so triplets are scored, kept and dropped as any others (|lam_i|·‖P_:i‖·‖Q_i:‖ and the
gradient of lam); nothing may turn the basis. A rank costs one trained number, and d_in + d_out numbers in the exported
plain LoRA, which is what a budget in parameters or bytes counts; lam_out costs d_out whatever the rank.

Cost: each adapter holds its own copy of P and Q; gradients and optimizer state are those of the vectors alone. Known
weakness: to reach what trained factors reach takes many more ranks, and exported they are all paid for. Nor is the
memory of one shared pair saved. Views of one storage would be right only until the first rank is cut: layers then keep
different ranks, so that what is held after shrinking is copies again; a cut that erases, and a checkpoint that is
loaded, write into P and Q in place, which would change them in every layer; and moving a model to a device, or into
safetensors, parts or refuses shared storage anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def shared_pair(shapes: Sequence[tuple[int, int]], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, max d_in) and B (max d_out, rank) for layers of these (d_in, d_out), in float32 on the CPU.

    Kaiming-uniform, from torch's global generator; each layer takes the first columns of A and the first rows of B, as
    in PEFT.
    """
    a, b = torch.empty(rank, max(s[0] for s in shapes)), torch.empty(max(s[1] for s in shapes), rank)
    for matrix in (a, b):
        if matrix.numel():
            nn.init.kaiming_uniform_(matrix)
    return a, b
