"""The kinds of layers that can be adapted, and how each computes a low-rank update: one small strategy per kind.

To an adapter every weight is a matrix W (d_out, d_in), and its update is ΔW = P Q. A kind recognises its layers and
defines how the matrix is laid out in the stored weight, what P Q adds to the layer's output without forming ΔW, and how
the pair is laid out in a PEFT file:

    linear        W as stored                          lora_A (r, in)               lora_B (out, r)
    conv1d        transformers' Conv1D: W transposed   the same
    embedding     W = Eᵀ, (dim, num_embeddings)        lora_embedding_A (r, num)    lora_embedding_B (dim, r)
    convolution   W (out, in / groups · kernel)        lora_A (r, in, *kernel)      lora_B (out, r, 1, ...)
    expert        W of one expert in a stack           :mod:`rankalloc.storage.experts`

A new kind is one subclass of :class:`Kind` and one entry in :data:`LAYER_KINDS`, before those that would match its
layers too: the first that matches a layer is its kind.

The triplets of a grouped convolution are those of its weight as a matrix: one row of Q serves every group. PEFT's
lora_A sees all channels, so the file repeats row i once for each group, with zeros outside that group's channels. The
file's rank is then groups · r, and PEFT computes the right output from it; budgets do not count the zeros. PEFT cannot
merge grouped convolutions; :func:`rankalloc.merge` can. When PEFT itself trains a grouped convolution, its update mixes
the groups and is not an update of the grouped weight: :func:`rankalloc.load` refuses such a file, while
:func:`rankalloc.export` only rewrites it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import RankallocError
from .experts import ExpertMatrix
from .formula import is_linear, is_lookup
from .quantized import scheme_of

Base = TypeVar("Base", bound=nn.Module)
"""The type of a kind's layers."""

_CONVOLVE: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Kind(ABC, Generic[Base]):
    """What nn.Linear and most others share; a subclass overrides what differs."""

    name: str
    titles: tuple[str, ...]
    """The layers in the words of a message."""
    types: tuple[type[nn.Module], ...] = ()
    """Classes whose instances are of this kind unless they compute their output differently."""
    keys = ("lora_A.weight", "lora_B.weight")
    attributes: tuple[str, ...] = ()
    """What other code reads from such a layer, beside weight and bias."""
    plain = True
    """Whether the file holds Q and P as plain matrices."""
    takes_numbers = True
    """Whether inputs are numbers, which can be cast and dropped out; token ids cannot."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is a layer of this kind and computes its output as the kind says."""

    def why_not(self, module: nn.Module) -> str | None:
        """Why ``module`` cannot be adapted although it is of this kind, in a few words; else None."""
        return None

    def weight_dims(self, base: Base) -> int:
        """How many dimensions the stored weight has when it is not packed."""
        return 2

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The stored weight as (d_out, d_in); a view wherever its strides allow one."""
        return weight

    def stored(self, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`matrix`: (d_out, d_in) in the shape of ``weight``."""
        return matrix

    def fan_in(self, d_in: int) -> int:
        """How many inputs one output sums up, which determines the scale that Q is drawn with."""
        return d_in

    def blank(self, base: Base, q: torch.Tensor) -> None:
        """Set the entries of a fresh Q (r, d_in) to zero that must stay zero."""

    def update(self, base: Base, x: torch.Tensor, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """What ΔW = P Q adds to base(x); q (r, d_in), p (d_out, r)."""
        return F.linear(F.linear(x, q), p)

    def groups(self, base: Base) -> int:
        """How often the file repeats each row of Q."""
        return 1

    def pack(self, base: Base, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Q (k, d_in) and P (d_out, k), scaled, as the two tensors of the file."""
        return a, b

    def unpack(self, base: Base, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of :meth:`pack`. Raises RankallocError, without a subject, if they do not fit ``base``."""
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise RankallocError("its factors do not fit each other")
        return a, b

    def caveat(self, base: Base) -> str | None:
        """What PEFT gets wrong when it computes with the file, without a subject; None when nothing."""
        return None


class Linear(Kind[nn.Linear]):
    """nn.Linear, and the quantised layers that compute a linear map (:mod:`rankalloc.layers.quantized`)."""

    name = "linear"
    titles = ("nn.Linear",)
    types = (nn.Linear,)

    def matches(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            return scheme_of(module) is not None or (isinstance(module, nn.Linear) and is_linear(module))
        return True

    def why_not(self, module: nn.Module) -> str | None:
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads this weight directly and would never call an adapter"
        return None


class Conv1D(Kind[Base]):
    """transformers' Conv1D: a linear layer that keeps its weight as (d_in, d_out)."""

    name = "conv1d"
    titles = ("transformers' Conv1D",)

    def matches(self, module: nn.Module) -> bool:
        # by name, so that torch alone is enough for models that are not from transformers
        return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T

    def stored(self, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return matrix.T


class Embedding(Conv1D[nn.Embedding]):
    """nn.Embedding: a linear layer of one-hot inputs. A padding row stays unchanged: its column of Q starts at zero
    and gets no gradient."""

    name = "embedding"
    titles = ("nn.Embedding",)
    types = (nn.Embedding,)
    keys = ("lora_embedding_A", "lora_embedding_B")
    attributes = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "sparse")
    takes_numbers = False

    def matches(self, module: nn.Module) -> bool:
        own = isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward
        return is_lookup(module) if own else isinstance(module, nn.Embedding)

    def why_not(self, module: nn.Module) -> str | None:
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return "an embedding with max_norm changes its own weight at each call, which an adapter cannot follow"
        return None

    def fan_in(self, d_in: int) -> int:
        return 1  # one input is 1 and all others are 0

    def blank(self, base: nn.Embedding, q: torch.Tensor) -> None:
        if base.padding_idx is not None:
            q[:, base.padding_idx] = 0.0

    def update(self, base: nn.Embedding, x: torch.Tensor, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return F.linear(F.embedding(x, q.T, padding_idx=base.padding_idx), p)


class Expert(Kind[ExpertMatrix]):
    """One expert's matrix in a stacked parameter: a linear layer that is computed by the module of all experts."""

    name = "expert"
    titles = ("stacked experts",)
    types = (ExpertMatrix,)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, ExpertMatrix)


Convolving = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Convolution(Kind[Convolving]):
    """nn.Conv1d, nn.Conv2d and nn.Conv3d: the kernel flattened to (d_out, in / groups · kernel). The first factor
    convolves as the layer does (stride, padding and its mode, dilation, groups); the second one is pointwise."""

    name = "convolution"
    titles = ("nn.Conv1d", "nn.Conv2d", "nn.Conv3d")
    types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    plain = False
    attributes = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    )

    def matches(self, module: nn.Module) -> bool:
        own: Any = type(module)
        return any(
            isinstance(module, c) and own.forward is c.forward and own._conv_forward is c._conv_forward
            for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        )

    def weight_dims(self, base: Convolving) -> int:
        return len(base.kernel_size) + 2

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1)

    def stored(self, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return matrix.reshape(weight.shape)

    def update(self, base: Convolving, x: torch.Tensor, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        kernel = base.weight.shape[1:]
        q = q.reshape(len(q), *kernel)
        z = base._conv_forward(x, q if base.groups == 1 else torch.cat([q] * base.groups), None)
        pointwise = p.reshape(*p.shape, *[1] * (len(kernel) - 1))
        return _CONVOLVE[len(kernel) - 1](z, pointwise, groups=base.groups)

    def groups(self, base: Convolving) -> int:
        return base.groups

    def pack(self, base: Convolving, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        channels, *kernel = base.weight.shape[1:]
        blocks = a.new_zeros(base.groups, len(a), base.groups, channels, *kernel)
        for group in range(base.groups):
            blocks[group, :, group] = a.reshape(len(a), channels, *kernel)
        packed = blocks.reshape(base.groups * len(a), base.in_channels, *kernel)
        return packed, b.reshape(*b.shape, *[1] * len(kernel))

    def unpack(self, base: Convolving, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        channels, *kernel = base.weight.shape[1:]
        groups, rank = base.groups, b.shape[1] if b.dim() > 1 else 0
        shapes = (groups * rank, base.in_channels, *kernel), (base.out_channels, rank, *[1] * len(kernel))
        if (tuple(a.shape), tuple(b.shape)) != shapes:
            raise RankallocError(
                f"its factors are {tuple(a.shape)} and {tuple(b.shape)}, and this layer takes {shapes[0]} and "
                f"{shapes[1]}"
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

    def caveat(self, base: Convolving) -> str | None:
        lost = []
        if any(step != 1 for step in base.dilation):
            lost.append(f"dilation={base.dilation}")
        if base.padding_mode != "zeros":
            lost.append(f"padding_mode={base.padding_mode!r}")
        if not lost:
            return None
        merging = "and cannot merge grouped ones; " if base.groups > 1 else "unless it merges it; "
        return f"PEFT leaves {' and '.join(lost)} out of the adapter of a convolution {merging}rankalloc.load does not"


LAYER_KINDS: dict[str, Kind[Any]] = {
    kind.name: kind for kind in (Linear(), Conv1D[nn.Module](), Embedding(), Convolution(), Expert())
}
"""The kinds by name; a layer is of the first that matches it."""

LINEAR = (Linear.name, Conv1D.name)
"""Names of the kinds that multiply by a matrix."""
