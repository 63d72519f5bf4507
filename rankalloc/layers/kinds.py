"""What a low-rank update is to each kind of layer: one small strategy a kind, and the adapter stays one class.

To an adapter every weight is a matrix W (d_out, d_in), and its update ΔW = P Q. A kind says how the matrix lies in
the stored weight, what P Q adds to the layer's output without forming ΔW, and how the pair lies in a PEFT file:

    linear        W as stored                          lora_A (r, in)               lora_B (out, r)
    conv1d        transformers' Conv1D: W transposed   the same
    embedding     W = Eᵀ, (dim, num_embeddings)        lora_embedding_A (r, num)    lora_embedding_B (dim, r)
    convolution   W (out, in / groups · kernel)        lora_A (r, in, *kernel)      lora_B (out, r, 1, ...)

A grouped convolution's triplets are those of its weight as a matrix: one row of Q serves every group. PEFT's lora_A
sees all channels, so in the file row i stands once a group, zero outside that group's channels: rank groups · r, the
layer's own numbers and zeros, and what PEFT computes from it is right. (Budgets count no such zeros, and none of the
padding either.) PEFT cannot merge grouped convolutions; :func:`rankalloc.merge` can. A file that PEFT trained over
all groups at once is no update of the grouped weight: loading it is refused, exporting it again is not.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import RankallocError

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Kind:
    """nn.Linear, and what the others share with it."""

    name = "linear"
    keys = ("lora_A.weight", "lora_B.weight")
    attributes: tuple[str, ...] = ()
    """What other code reads from such a layer, beside weight and bias."""
    plain = True
    """Whether the file holds Q and P as the matrices they are."""
    takes_numbers = True
    """Whether inputs are numbers, which can be cast and dropped out; token ids cannot."""

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The stored weight as (d_out, d_in); a view wherever its strides allow one."""
        return weight

    def stored(self, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`matrix`: (d_out, d_in) in the shape of ``weight``."""
        return matrix

    def fan_in(self, d_in: int) -> int:
        """How many inputs are added up in one output, which decides the size that Q is drawn with."""
        return d_in

    def blank(self, base: nn.Module, q: torch.Tensor) -> None:
        """Set to zero what a fresh Q (r, d_in) must not touch."""

    def update(self, base: nn.Module, x: torch.Tensor, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """What ΔW = P Q adds to base(x); q (r, d_in), p (d_out, r)."""
        return F.linear(F.linear(x, q), p)

    def groups(self, base: nn.Module) -> int:
        """How often each row of Q stands in the file."""
        return 1

    def pack(self, base: nn.Module, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Q (k, d_in) and P (d_out, k), scaled, as the two tensors of the file."""
        return a, b

    def unpack(self, base: nn.Module, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of :meth:`pack`. Raises RankallocError, without a subject, when they are no pair for ``base``."""
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise RankallocError("its factors do not fit each other")
        return a, b

    def caveat(self, base: nn.Module) -> str | None:
        """What PEFT gets wrong when it computes with the file, without a subject; None when nothing."""
        return None


class Conv1D(Kind):
    """transformers' Conv1D: a linear layer that keeps its weight as (d_in, d_out)."""

    name = "conv1d"

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T

    def stored(self, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return matrix.T


class Embedding(Conv1D):
    """nn.Embedding: a linear layer of one-hot inputs. A padding row stays as it is: its column of Q begins at zero
    and gets no gradient."""

    name = "embedding"
    keys = ("lora_embedding_A", "lora_embedding_B")
    attributes = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "sparse")
    takes_numbers = False

    def fan_in(self, d_in: int) -> int:
        return 1  # one input is 1 and all others are 0

    def blank(self, base: nn.Module, q: torch.Tensor) -> None:
        if base.padding_idx is not None:
            q[:, base.padding_idx] = 0.0

    def update(self, base: nn.Module, x: torch.Tensor, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return F.linear(F.embedding(x, q.T, padding_idx=base.padding_idx), p)


class Convolution(Kind):
    """nn.Conv1d, nn.Conv2d and nn.Conv3d: the kernel flattened to (d_out, in / groups · kernel). The first factor
    convolves as the layer does (stride, padding and its mode, dilation, groups); the second one is pointwise."""

    name = "convolution"
    plain = False
    attributes = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    )

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1)

    def stored(self, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return matrix.reshape(weight.shape)

    def update(self, base: nn.Module, x: torch.Tensor, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        kernel = base.weight.shape[1:]
        q = q.reshape(len(q), *kernel)
        z = base._conv_forward(x, q if base.groups == 1 else torch.cat([q] * base.groups), None)
        pointwise = p.reshape(*p.shape, *[1] * (len(kernel) - 1))
        return _CONVOLVE[len(kernel) - 1](z, pointwise, groups=base.groups)

    def groups(self, base: nn.Module) -> int:
        return base.groups

    def pack(self, base: nn.Module, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        channels, *kernel = base.weight.shape[1:]
        blocks = a.new_zeros(base.groups, len(a), base.groups, channels, *kernel)
        for group in range(base.groups):
            blocks[group, :, group] = a.reshape(len(a), channels, *kernel)
        packed = blocks.reshape(base.groups * len(a), base.in_channels, *kernel)
        return packed, b.reshape(*b.shape, *[1] * len(kernel))

    def unpack(self, base: nn.Module, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        channels, *kernel = base.weight.shape[1:]
        groups, rank = base.groups, b.shape[1] if b.dim() > 1 else 0
        shapes = (groups * rank, base.in_channels, *kernel), (base.out_channels, rank, *[1] * len(kernel))
        if (tuple(a.shape), tuple(b.shape)) != shapes:
            raise RankallocError(
                f"its factors are {tuple(a.shape)} and {tuple(b.shape)}, and {shapes[0]} and {shapes[1]} is what this "
                "layer takes"
            )
        blocks = a.reshape(groups, rank, groups, channels, *kernel)
        first = blocks[0, :, 0]
        expected = torch.zeros_like(blocks)
        for group in range(groups):
            expected[group, :, group] = first
        if not torch.equal(blocks, expected):
            raise RankallocError(
                f"it was trained over all {groups} groups of this convolution at once, which no change of its weight "
                "can express"
            )
        return first.flatten(1), b.flatten(1)

    def caveat(self, base: nn.Module) -> str | None:
        lost = []
        if any(step != 1 for step in base.dilation):
            lost.append(f"dilation={base.dilation}")
        if base.padding_mode != "zeros":
            lost.append(f"padding_mode={base.padding_mode!r}")
        if not lost:
            return None
        merging = "and cannot merge grouped ones; " if base.groups > 1 else "unless it merges it; "
        return f"PEFT leaves {' and '.join(lost)} out of the adapter of a convolution {merging}rankalloc.load does not"


KINDS: dict[str, Kind] = {kind.name: kind for kind in (Kind(), Conv1D(), Embedding(), Convolution())}
LINEAR = (Kind.name, Conv1D.name)
