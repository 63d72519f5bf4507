"""LoRA-XS's frozen pair: singular vectors of the layer's own weight, between which one small matrix is trained.

Bałazy et al., arXiv 2405.17604: ΔW = s · U_r Σ_r R V_rᵀ, where U_r Σ_r V_rᵀ is the truncated SVD of the frozen weight
W (d_out, d_in). P = U_r Σ_r and Q = V_rᵀ stay as they are; only the core R (r, r) is trained, r² numbers a layer. The
exported plain LoRA of rank r has lora_B = s P R and lora_A = Q, and that is what a budget counts.

The paper draws R from N(0, 1e-5²). Here R begins at zero, so that ΔW = 0 as in every other parametrisation; that is no
stationary point, since ∂L/∂R = s Pᵀ ∂L/∂ΔW Qᵀ, and the first step of Adam is a hundred times what the paper draws. Its
s is α / r, as here.

It is a baseline: no single triplet of it has a worth of its own, since every entry of R joins two of them, so no method
chooses its ranks while it trains. Layers may differ in rank, by a plan or by hand. A triplet that is dropped takes its
row and its column of R along, and what is left is LoRA-XS of that rank, because truncated SVDs are nested.

Any layer that an adapter can stand beside has a weight that is a matrix: linear layers, embeddings (without the padding
row), convolutions, experts, and quantised layers, whose dequantised weight is decomposed.

Cost: one decomposition of each layer when adapters are attached, 0.3 s for a 768 × 3072 weight on one core: the
eigenvectors of W Wᵀ (or Wᵀ W, whichever is smaller) in float64, which gives more digits than an SVD in float32. P R is
formed at every forward pass, d_out · r² products. Optimizer state is that of R. Known weakness: the update cannot leave
the span of the weight's largest singular directions, and nothing says that the task lies in it; rates are other than
LoRA's, since a step of R is stretched by Σ.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import RankallocError
from ..layers.adaptable import full_weight

_SMALLEST = 1e-5
"""σ_r / σ_1 below which eigenvectors of W Wᵀ, whose eigenvalues are σ², are too few digits."""


@torch.no_grad()
def singular_pair(layer: nn.Module, rank: int, name: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Q = V_rᵀ (rank, d_in) and P = U_r Σ_r (d_out, rank) of a layer's weight as a matrix, in float64, on its device.

    The largest entry of every row of Q is positive, so that the same weight gives the same pair.

    Args:
        rank: at most min(d_in, d_out).
        name: of the layer, in messages.

    Raises:
        RankallocError: a weight is not finite.
    """
    weight = full_weight(layer).double()
    d_out, d_in = weight.shape
    if weight.is_meta or not rank:
        return weight.new_empty(rank, d_in), weight.new_empty(d_out, rank)
    if not torch.isfinite(weight).all():
        raise RankallocError(
            f"the weight of {name or type(layer).__name__} is not finite, so it has no singular vectors for "
            "init='lora-xs' to stand between; check the checkpoint"
        )
    wide = d_out <= d_in
    short = weight if wide else weight.T
    values, vectors = torch.linalg.eigh(short @ short.T)
    sizes, left = values[-rank:].flip(0).clamp(min=0).sqrt(), vectors[:, -rank:].flip(1)
    if sizes[-1] > _SMALLEST * sizes[0]:
        right = (left.T @ short) / sizes[:, None]
    else:
        u, sigma, vh = torch.linalg.svd(short, full_matrices=False)
        left, sizes, right = u[:, :rank], sigma[:rank], vh[:rank]
    p, q = (left, right) if wide else (right.T, left.T)
    signs = q.gather(1, q.abs().argmax(1, keepdim=True)).sign()
    return q * signs, p * (sizes * signs.flatten())
