"""The adapter: ΔW = s·P·Λ·Q beside a frozen layer.

P is (d_out, r), Λ = diag(lam) with lam (r,), Q is (r, d_in); row i of Q, column i of P and lam[i]
are one triplet, the unit that is scored, kept and dropped. s = alpha / rank is fixed for the whole
run, whatever the live rank (AdaLoRA's author reports that rescaling hurts).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .base_layers import kind_of, shape_of
from .errors import RankallocError
from .fused import compute_dtype, fused_linear
from .lowrank import Factors, singular_values

INITS = ("svd", "lora", "gate")


class Adapter(nn.Module):
    """A frozen linear layer and its low-rank update: y = base(x) + s · P Λ Q dropout(x).

    Args:
        base_layer: the layer to adapt; kept, not copied.
        rank: number of triplets; 0 leaves the layer as it is.
        scaling: s.
        init: "svd": lam = 0 and P, Q ~ N(0, 0.02), all three trained (AdaLoRA, arXiv 2303.10512).
            "lora": P = 0, Q kaiming-uniform with a = √5, lam = 1 and not trained, which is plain
            LoRA (arXiv 2106.09685). "gate": like "lora" with a trained lam ~ N(0, 1) between the two
            factors (SoRA, arXiv 2311.11696). All start at ΔW = 0.
        dropout: probability of zeroing an input of the adapter while training.
        dtype: of P, lam and Q.

    Shapes: input (..., d_in), output (..., d_out).

    Example:
        >>> import torch
        >>> from rankalloc.adapter import Adapter
        >>> adapter = Adapter(torch.nn.Linear(8, 4), rank=2, scaling=1.0)
        >>> adapter(torch.ones(3, 8)).shape, adapter.live_rank
        (torch.Size([3, 4]), 2)
    """

    P: nn.Parameter
    lam: nn.Parameter
    Q: nn.Parameter
    kept: torch.Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        scaling: float,
        init: str = "svd",
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.kind = kind_of(base_layer)
        self.d_in, self.d_out = shape_of(base_layer)
        self.scaling = float(scaling)
        self.init = init
        self.initial_rank = rank
        self.drawn = 0  # rank of this training step, for rules that draw one; 0 for all
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        place: dict[str, Any] = {"device": base_layer.weight.device, "dtype": dtype}
        self.P = nn.Parameter(torch.zeros(self.d_out, rank, **place))
        self.lam = nn.Parameter(torch.zeros(rank, **place), requires_grad=init != "lora")
        self.Q = nn.Parameter(torch.zeros(rank, self.d_in, **place))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool, device=place["device"]))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        if self.init == "svd":
            self.P.normal_(0.0, 0.02)
            self.Q.normal_(0.0, 0.02)
        else:
            if self.init == "gate":
                self.lam.normal_()
            else:
                self.lam.fill_(1.0)
            if self.rank:
                nn.init.kaiming_uniform_(self.Q, a=math.sqrt(5))

    @property
    def rank(self) -> int:
        """Triplets held, dropped ones that may still come back included."""
        return self.lam.numel()

    @property
    def live_rank(self) -> int:
        """Triplets that the last allocation kept."""
        return int(self.kept.sum())

    @property
    def params_per_rank(self) -> int:
        """Parameters that one rank takes in a plain LoRA: d_in + d_out."""
        return self.d_in + self.d_out

    # what other code reads from the layer it thinks it has
    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.d_in

    @property
    def out_features(self) -> int:
        return self.d_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rank:
            return self.base_layer(x)
        q, scaled = self._factors()
        if self.training:
            dtype = compute_dtype(self.base_layer, self.kind, x, (self.P, self.lam, self.Q))
            if dtype is not None:
                return fused_linear(self.base_layer, self.kind, x, self.dropout(x), q, scaled, dtype)
        out = self.base_layer(x)
        x = self.dropout(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(q.dtype)
        return out + F.linear(F.linear(x, q), scaled).to(out.dtype)

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Q and P Λ s of this pass: of all triplets, or while training of the first ``drawn`` at α / drawn."""
        if not (self.drawn and self.training):
            return self.Q, self._scaled()
        rank = min(self.drawn, self.rank)
        return self.Q[:rank], self.P[:, :rank] * (self.scaling * self.initial_rank / rank)

    def _scaled(self) -> torch.Tensor:
        # Λ·s goes into P, as it does in the exported file: same products in the same order, so the same numbers;
        # and d_out · r numbers are scaled instead of one row of outputs a token
        return self.P * (self.lam * self.scaling)

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """ΔW = s · P Λ Q, (d_out, d_in), in the adapter's dtype."""
        return self._scaled() @ self.Q

    @torch.no_grad()
    def singular_values(self) -> torch.Tensor:
        """The true singular values of ΔW, falling, (r,) in float64 on the CPU.

        Thin QR of P and Qᵀ, then the SVD of the r × r core: O((d_in + d_out) r²), ΔW is never formed.
        Raises RankallocError when a weight is not finite.
        """
        if not self.rank:
            return torch.zeros(0, dtype=torch.float64)
        if not all(torch.isfinite(factor).all() for factor in (self.P, self.lam, self.Q)):
            raise RankallocError(
                "an adapter's weights are not finite: training has diverged; lower the learning rate, or clip the "
                "gradients (max_grad_norm)"
            )
        return singular_values(Factors(self.P, self.Q, self.lam, self.scaling))

    @torch.no_grad()
    def drop(self, kept: torch.Tensor, erase: bool = False) -> None:
        """Mark the triplets that stay, (r,) bool, and set lam of the others to zero.

        They keep their P and Q, so a dropped triplet can come back at a later allocation; with ``erase``
        those become zero too, and with them every gradient the triplet would have.
        """
        self.kept.copy_(kept)
        self.lam.mul_(self.kept)
        if erase:
            self.P.mul_(self.kept)
            self.Q.mul_(self.kept[:, None])

    @torch.no_grad()
    def resize(self, rank: int) -> None:
        """Hold exactly ``rank`` triplets, contents undefined: room for loaded weights."""
        replace_data(self.P, self.P.data.new_empty(self.d_out, rank))
        replace_data(self.lam, self.lam.data.new_empty(rank))
        replace_data(self.Q, self.Q.data.new_empty(rank, self.d_in))
        self.kept = self.kept.new_ones(rank)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # a checkpoint written after ranks were removed is smaller than a freshly attached adapter
        incoming = state_dict.get(prefix + "lam")
        if incoming is not None and incoming.dim() == 1 and incoming.numel() != self.rank:
            self.resize(incoming.numel())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_out={self.d_out}, rank={self.live_rank}/{self.rank}, scaling={self.scaling:g}"


def replace_data(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Give ``parameter`` new contents of another shape; it stays the same object.

    A graph that is still referenced (a loss someone holds on to) keeps the parameter's gradient
    accumulator alive, and with it the old shape. torch forgets the accumulator when the type
    changes, so the contents pass through another dtype.
    """
    parameter.grad = None
    parameter.data = data.new_empty(0, dtype=torch.float64 if data.dtype != torch.float64 else torch.float32)
    parameter.data = data
