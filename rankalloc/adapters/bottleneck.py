"""Bottleneck adapters (Houlsby et al., ICML 2019, arXiv 1902.00751): what LoRA is compared with.

    y = h + W_up · gelu(W_down h + b_down) + b_up          h = base(x) (…, d), W_down (m, d), W_up (d, m)

behind a frozen layer, before its output joins the residual stream. W_up is P and W_down is Q of a
:class:`~rankalloc.adapters.adapter.Adapter`, with Λ = 1 and m its rank, so that budgets, checkpoints and traces hold it
like any other. Its size is

    2·d·m + m + d parameters, biases counted; a place with m = 0 has none.

It begins near the identity, as in the paper: both matrices are drawn from N(0, 0.01²), cut off at two standard
deviations, and the biases are zero.

Cost: it comes after the layer and not beside it, in training and ever after: between two layers stands a function that
is not linear, so it can be folded into neither of them. Here the layer norms stay frozen, which the paper trains along.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import RankallocError
from ..layers.adaptable import shape_of
from .adapter import Adapter
from .triplets import BOTTLENECK, Factor

_STD = 0.01


class BottleneckAdapter(Adapter):
    """A frozen layer and a bottleneck behind it.

    Args:
        base_layer: a linear layer.
        rank: m, its units; 0 for none, and the layer is as it was.
        dropout: probability of zeroing an input of the bottleneck while training.
        dtype: of its parameters.
        others: arguments of an Adapter that mean nothing here: a bottleneck has no scale.

    Shapes: input (..., d_in), output (..., d_out) of the layer; ``d_in`` and ``d_out`` of the bottleneck itself are d.
    """

    b_down: nn.Parameter
    b_up: nn.Parameter

    def __init__(
        self, base_layer: nn.Module, rank: int, scaling: float = 1.0, init: str = BOTTLENECK, dropout: float = 0.0,
        dtype: torch.dtype = torch.float32, **others: Any,
    ) -> None:
        super().__init__(base_layer, rank, 1.0, BOTTLENECK, dropout, dtype)
        self.b_down = nn.Parameter(torch.zeros(rank, device=self.P.device, dtype=dtype))
        self.b_up = nn.Parameter(torch.zeros(self.d_out, device=self.P.device, dtype=dtype))

    def _sides(self, base_layer: nn.Module) -> tuple[int, int]:
        width = shape_of(base_layer)[1]
        return width, width

    @torch.no_grad()
    def _initialise(self, pair: Any) -> None:
        self.lam.fill_(1.0)
        for matrix in (self.P, self.Q):
            nn.init.trunc_normal_(matrix, 0.0, _STD, -2 * _STD, 2 * _STD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(x)
        if not self.rank:
            return out
        dropout: Any = self.dropout  # None without one
        inner = out if dropout is None else dropout(out)
        if not torch.is_autocast_enabled(out.device.type):
            inner = inner.to(self.Q.dtype)
        units = F.gelu(F.linear(inner, self.Q, self.b_down))
        return out + F.linear(units, self.P, self.b_up).to(out.dtype)

    def factors(self) -> tuple[Factor, ...]:
        return (*super().factors(), Factor("b_down", self.b_down, (0,)))

    def biases(self) -> list[nn.Parameter]:
        return [self.b_down, self.b_up]

    def extra_params(self) -> int:
        return self.live_rank + self.d_out if self.live_rank else 0

    def is_finite(self) -> bool:
        return super().is_finite() and all(bool(torch.isfinite(bias).all()) for bias in self.biases())

    def delta_weight(self) -> NoReturn:
        """Always raises RankallocError: what a bottleneck adds is no change of a weight."""
        raise RankallocError(
            "a bottleneck adapter is not a linear map, so it cannot be folded into a weight or written as LoRA; keep "
            "it in the model (rankalloc.save writes it as it is), or train a LoRA by another method"
        )
