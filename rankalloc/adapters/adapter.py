"""The adapter: ΔW = s·P·Λ·Q beside a frozen layer.

P is (d_out, r), Λ = diag(lam) with lam (r,), Q is (r, d_in); row i of Q, column i of P and lam[i]
are one triplet, the unit that is scored, kept and dropped. s, alpha / rank or alpha / √rank, is fixed for
the whole run, whatever the live rank (AdaLoRA's author reports that rescaling hurts). How the product acts on a layer
other than nn.Linear is defined by its kind (:mod:`rankalloc.layers.kinds`).

                 r                r                 d_in
             ┌───────┐        ┌───────┐        ┌─────────────┐
             │ │     │        │ ·     │        │─────────────│ row i
    ΔW = s · │ │  P  │ d_out ·│   λ_i │ r    · │      Q      │ r
             │ │     │        │     · │        └─────────────┘
             └───────┘        └───────┘
            column i         (lam, a vector)

LoRA's variants are the same adapter with fewer factors trained (:data:`rankalloc.adapters.triplets.TRAINED`):

- "lora-fa" (Zhang et al., arXiv 2308.03303): Q stays as drawn. The backward pass then needs z = Q x and
  not x, so an adapter beside a frozen linear layer keeps r numbers a token instead of d_in.
- "vera" (Kopiczko et al., arXiv 2310.11454): P and Q stay as drawn, and an output scale joins them; see
  :mod:`rankalloc.adapters.vera`.
- "lora-xs" (Bałazy et al., arXiv 2405.17604): P and Q are singular vectors of the layer's own weight, and a core R
  (r, r) between them is trained; see :mod:`rankalloc.adapters.lora_xs`.
"""

from __future__ import annotations

import math
import uuid
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import nn

from ..errors import RankallocError
from ..layers.adaptable import kind_of, shape_of
from ..layers.families import Family, output
from ..layers.fused import Layer, compute_dtype, frozen_linear, fused_linear
from ..layers.kinds import LAYER_KINDS, Kind
from ..layers.replicas import why_no_parameters
from .lora_xs import singular_pair
from .triplets import TRAINED, Triplets
from .vera import shared_pair

_OF_FEW = ("lam_out", "core")
"""Factors that only the parametrisations have which train them."""

COPIES: WeakSet[Adapter] = WeakSet()
"""Living adapters that are copies of another one; :mod:`rankalloc.training.averages` looks for averages among them."""


class Adapter(Triplets, nn.Module):
    """A frozen layer and its low-rank update: y = base(x) + s · P Λ Q dropout(x).

    Args:
        base_layer: the layer to adapt; not copied.
        rank: number of triplets; 0 leaves the layer as it is.
        scaling: s.
        init: "svd": lam = 0 and P, Q ~ N(0, 0.02), all three trained (AdaLoRA, arXiv 2303.10512).
            "lora": P = 0, Q kaiming-uniform with a = √5, lam = 1 and not trained, which is plain
            LoRA (arXiv 2106.09685). "gate": like "lora" with a trained lam ~ N(0, 1) between the two
            factors (SoRA, arXiv 2311.11696). "lora-fa": like "lora" with Q not trained. "vera": lam and an output
            scale alone. "lora-xs": a core between P and Q alone. All start at ΔW = 0.
        dropout: probability of zeroing an input of the adapter while training; token ids are not dropped.
        dtype: of P, lam and Q.
        exponent: e of s = α / rank^e, for rules that use fewer triplets at the scale of their number.
        pair: the (A, B) of :func:`rankalloc.adapters.vera.shared_pair` for "vera", or of
            :func:`rankalloc.adapters.lora_xs.singular_pair` for "lora-xs"; None makes one for this layer alone.

    Shapes: input (..., d_in), output (..., d_out) beside a linear layer; the layer's own beside an embedding or a
    convolution, whose weight is read as a matrix (d_out, d_in).

    Example:
        >>> import torch
        >>> from rankalloc.adapters.adapter import Adapter
        >>> adapter = Adapter(torch.nn.Linear(8, 4), rank=2, scaling=1.0)
        >>> adapter(torch.ones(3, 8)).shape, adapter.live_rank
        (torch.Size([3, 4]), 2)
    """

    P: nn.Parameter
    lam: nn.Parameter
    Q: nn.Parameter

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        scaling: float,
        init: str = "svd",
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        pair: tuple[torch.Tensor, torch.Tensor] | None = None,
        exponent: float = 1.0,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.origin = uuid.uuid4().hex  # a copy has its original's
        self.kind = kind_of(base_layer)
        self.layout: Kind = LAYER_KINDS[self.kind or "linear"]
        for name in self.layout.attributes:  # what other code reads from the layer it thinks it has
            setattr(self, name, getattr(base_layer, name))
        self.d_in, self.d_out = self._sides(base_layer)
        self.scaling = float(scaling)
        self.init = init
        self.initial_rank = rank
        self.exponent = exponent
        self.drawn = 0  # rank of this training step, at the scale of that rank, for rules that draw one; 0 for all
        self.family: Family | None = None  # adapters called with the same tensor; None before the first training step
        self.register_module("dropout", nn.Dropout(dropout) if dropout else None)
        place: dict[str, Any] = {"device": base_layer.weight.device, "dtype": dtype}
        shapes: dict[str, tuple[int, ...]] = {"P": (self.d_out, rank), "lam": (rank,), "Q": (rank, self.d_in)}
        shapes |= {"lam_out": (self.d_out,), "core": (rank, rank)}
        for name, shape in shapes.items():
            trained = name in TRAINED[init]
            held = trained or name not in _OF_FEW
            factor = nn.Parameter(torch.zeros(shape, **place), requires_grad=trained) if held else None
            self.register_parameter(name, factor)
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool, device=place["device"]))
        self._initialise(pair)

    def _sides(self, base_layer: nn.Module) -> tuple[int, int]:
        """d_in of Q and d_out of P."""
        return shape_of(base_layer)

    @torch.no_grad()
    def _initialise(self, pair: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        if self.init == "svd":
            self.P.normal_(0.0, 0.02)
            self.Q.normal_(0.0, 0.02)
        elif self.init == "vera":
            a, b = pair or shared_pair([(self.d_in, self.d_out)], self.rank)
            self.P.copy_(b[: self.d_out, : self.rank])
            self.Q.copy_(a[: self.rank, : self.d_in])
            self.lam.fill_(0.1)
        elif self.init == "lora-xs":
            a, b = pair or singular_pair(self.base_layer, self.rank)
            self.P.copy_(b)
            self.Q.copy_(a)
            self.lam.fill_(1.0)
        else:
            if self.init == "gate":
                self.lam.normal_()
            else:
                self.lam.fill_(1.0)
            # kaiming-uniform with a = √5; the fan of an embedding's one-hot input is 1
            gain = nn.init.calculate_gain("leaky_relu", math.sqrt(5))
            bound = math.sqrt(3.0) * (gain / math.sqrt(self.layout.fan_in(self.d_in)))
            self.Q.uniform_(-bound, bound)
        self.layout.blank(self.base_layer, self.Q)

    # what other code reads from the layer it thinks it has
    @property
    def weight(self) -> torch.Tensor:
        return cast(torch.Tensor, self.base_layer.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.base_layer, "bias", None)

    @property
    def in_features(self) -> int:
        return self.d_in

    @property
    def out_features(self) -> int:
        return self.d_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # looked up once: an attribute of a module costs as much as a small operator
        modules: dict[str, Any] = self._modules
        base, dropout, parameters = modules["base_layer"], modules["dropout"], self._parameters
        try:
            empty = not parameters["lam"].numel()  # type: ignore[union-attr]  # registered as None: lam_out alone
        except KeyError:
            raise RankallocError(why_no_parameters(self)) from None
        if empty:
            return frozen_linear(base, self.kind, x) if self.training else base(x)
        layer = self.layer()
        if self.training:
            dtype = compute_dtype(layer, x)
            if dtype is not None and dropout is None:
                return output(self, layer, x, dtype)
            if dtype is not None:
                return fused_linear([layer], x, dtype, dropout(x))[0]
        out = base(x)
        if self.layout.takes_numbers:
            if dropout is not None:
                x = dropout(x)
            if not torch.is_autocast_enabled(x.device.type):
                x = x.to(layer.factors[2].dtype)
        p, lam, q = layer.factors
        # the same products in the same order as in an exported file, so the same numbers
        return out + self.layout.update(base, x, q, p * (lam * layer.scaling)).to(out.dtype)

    def layer(self) -> Layer:
        """The base layer and the factors that this call uses."""
        parameters: dict[str, Any] = self._parameters
        base: Any = self._modules["base_layer"]
        try:
            p, lam, q = parameters["P"], parameters["lam"], parameters["Q"]
        except KeyError:
            raise RankallocError(why_no_parameters(self)) from None
        if parameters["lam_out"] is not None or parameters["core"] is not None:
            p = self.left()
        if self.training and self.drawn:
            rank = min(self.drawn, lam.numel())
            factors = p[:, :rank], lam.new_ones(rank), q[:rank]
            return Layer(base, self.kind, factors, self.scaling * self.stretch(rank))
        return Layer(base, self.kind, (p, lam, q), self.scaling)

    def uses_all_triplets(self, layer: Layer) -> bool:
        """Whether it trains, without dropout, with the factors in ``layer`` exactly as they are stored."""
        # not self.P: an attribute of a module costs as much as a small operator
        p, _, q = layer.factors
        modules, parameters = self._modules, self._parameters
        stored = p is parameters["P"] and q is parameters["Q"]
        return self.training and modules["dropout"] is None and stored

    def stretch(self, rank: int) -> float:
        """The scale of a nested adapter's first ``rank`` triplets relative to s, (r / rank)^e."""
        return (self.initial_rank / max(1, rank)) ** self.exponent

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self._parameters.values() if p is not None and p.requires_grad]

    def own_parameters(self) -> list[nn.Parameter]:
        return [p for p in self._parameters.values() if p is not None]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "family": None}  # a copy meets its own siblings

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        COPIES.add(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # a checkpoint written after ranks were removed is smaller than a freshly attached adapter
        incoming = state_dict.get(prefix + "lam")
        if incoming is not None and incoming.dim() == 1 and incoming.numel() != self.rank:
            self.resize(incoming.numel())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_out={self.d_out}, rank={self.live_rank}/{self.rank}, scaling={self.scaling:g}"
