"""What a method knows of an adapter: triplets of P, Λ and Q beside one layer.

Scores, rules, allocations and the canonical form read and change :class:`Triplets` alone, whoever computes the forward
pass. There are two: :class:`rankalloc.adapters.adapter.Adapter`, our own layer, and
:class:`rankalloc.adapters.driven.DrivenLayer`, a view of a LoRA layer of PEFT's, whose B is P and whose A is Q.

Where Λ is trained it holds the size of each triplet, and dropping one sets its λ to zero. Where P and Q are trained and
Λ stays 1 (plain LoRA), the factors hold the size, and dropping one sets its column of P to zero, as every triplet of
LoRA begins: it has no part in ΔW any more, and can grow back until it leaves memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import nn

from ..errors import RankallocError
from ..layers.kinds import Kind
from ..lowrank import Factors, singular_values

BOTTLENECK = "bottleneck"
"""The parametrisation that is no low-rank update (:mod:`.bottleneck`)."""

TRAINED = {
    "svd": ("P", "lam", "Q"),
    "lora": ("P", "Q"),
    "gate": ("P", "lam", "Q"),
    "lora-fa": ("P",),
    "vera": ("lam", "lam_out"),
    "lora-xs": ("core",),
    BOTTLENECK: ("P", "Q", "biases"),
}
"""{init: the factors it trains}."""

INITS = tuple(init for init in TRAINED if init != BOTTLENECK)
"""Parametrisations of a low-rank update."""
FIXED_Q = tuple(init for init, trained in TRAINED.items() if "Q" not in trained)
"""Parametrisations whose basis must stay as it is."""

TRIPLET_DIMS = {"P": 1, "lam": 0, "Q": 0}
"""{factor: the dimension that counts triplets}; both do in "lora-xs"'s core."""


class Factor(NamedTuple):
    """One factor of an adapter: its name, the tensor, and the dimensions that count triplets, both of "lora-xs"'s
    core."""

    name: str
    parameter: torch.Tensor
    dims: tuple[int, ...]


class Triplets:
    """The low-rank update ΔW = s·P·Λ·Q beside one layer, as methods see it.

    Attributes:
        P, lam, Q: the factors, (d_out, r), (r,) and (r, d_in).
        lam_out: the output scale (d_out,) of "vera"; None for all others.
        core: R (r, r) of "lora-xs" (:mod:`.lora_xs`); None for all others.
        kept: (r,) bool, the triplets that the last allocation kept.
        base_layer: the frozen layer.
        layout: its kind, :mod:`rankalloc.layers.kinds`.
        d_in, d_out: of its weight as a matrix.
        init: parametrisation, a key of :data:`TRAINED`.
        initial_rank: triplets at the start of the run.
        scaling: s.
        training: whether the layer is in training mode.
    """

    own_forward: ClassVar[bool] = True
    """Whether the forward pass is ours, so that a rule may change it."""

    if TYPE_CHECKING:  # parameters of a module in one, properties of the other: no attributes of this class

        @property
        def P(self) -> nn.Parameter: ...
        @property
        def lam(self) -> torch.Tensor: ...
        @property
        def Q(self) -> nn.Parameter: ...

    kept: torch.Tensor
    lam_out: nn.Parameter | None
    core: nn.Parameter | None
    base_layer: nn.Module
    layout: Kind
    d_in: int
    d_out: int
    init: str
    initial_rank: int
    exponent: float
    scaling: float
    training: bool
    drawn: int
    origin: str

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

    def extra_params(self) -> int:
        """Parameters beside those of its live ranks: the biases of a bottleneck."""
        return 0

    def biases(self) -> list[nn.Parameter]:
        """Vectors that train beside the factors: those of a bottleneck."""
        return []

    @property
    def sized_by_factors(self) -> bool:
        """Whether P and Q are trained and Λ is not, as in plain LoRA."""
        return {"P", "Q"} <= set(TRAINED[self.init]) and "lam" not in TRAINED[self.init]

    def trained(self) -> list[nn.Parameter]:
        """The factors that are trained."""
        raise NotImplementedError

    def own_parameters(self) -> list[nn.Parameter]:
        """Every parameter of the adapter, trained or not, without those of the base layer."""
        raise NotImplementedError

    def resized(self) -> None:
        """Called after triplets have left or room has been made: whatever else records the rank follows."""

    def stretch(self, rank: int) -> float:
        """The scale of a nested adapter's first ``rank`` triplets relative to s, (r / rank)^e."""
        return (self.initial_rank / max(1, rank)) ** self.exponent

    def left(self) -> torch.Tensor:
        """P, (d_out, r), with the output scale of "vera" or the core of "lora-xs" in it."""
        if self.core is not None:
            with torch.autocast(self.P.device.type, enabled=False):  # rounded once, with the product it is part of
                return self.P @ self.core
        return self.P if self.lam_out is None else self.P * self.lam_out[:, None]

    def scaled(self) -> torch.Tensor:
        """P Λ s, (d_out, r): what an exported file holds beside Q."""
        # scaling d_out · r numbers is cheaper than scaling the outputs of every token
        return self.left() * (self.lam * self.scaling)

    def factors(self) -> tuple[Factor, ...]:
        """P, lam and Q, and the core where there is one, trained or not, each with the dimensions that count
        triplets."""
        core = () if self.core is None else (Factor("core", self.core, (0, 1)),)
        return (*(Factor(name, getattr(self, name), (dim,)) for name, dim in TRIPLET_DIMS.items()), *core)

    def is_finite(self) -> bool:
        """Whether every number of the adapter is finite."""
        parts = (self.P, self.lam, self.Q, self.lam_out, self.core)
        return all(bool(torch.isfinite(part).all()) for part in parts if part is not None)

    @torch.no_grad()
    def sizes(self) -> torch.Tensor:
        """The size of each triplet, (r,) in float32: |λ|, times ‖P_i‖‖Q_i‖ where those hold the size."""
        size = self.lam.float().abs()
        return size * self.P.float().norm(dim=0) * self.Q.float().norm(dim=1) if self.sized_by_factors else size

    @torch.no_grad()
    def contributes(self) -> torch.Tensor:
        """(r,) bool: the triplets with a part in ΔW; dropped ones that have grown back are among them."""
        return (self.lam != 0) & (self.P != 0).any(0) if self.sized_by_factors else self.lam != 0

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """ΔW = s · P Λ Q, (d_out, d_in), in the adapter's dtype."""
        return self.scaled() @ self.Q

    @torch.no_grad()
    def singular_values(self) -> torch.Tensor:
        """The true singular values of ΔW, falling, (r,) in float64 on the CPU.

        Thin QR of P and Qᵀ, then the SVD of the r × r core: O((d_in + d_out) r²), ΔW is never formed.
        Raises RankallocError when a weight is not finite.
        """
        if not self.rank:
            return torch.zeros(0, dtype=torch.float64)
        if not self.is_finite():
            raise RankallocError(
                "an adapter's weights are not finite: training has diverged; lower the learning rate, or clip the "
                "gradients (max_grad_norm)"
            )
        return singular_values(Factors(self.left(), self.Q, self.lam, self.scaling))

    @torch.no_grad()
    def drop(self, kept: torch.Tensor, erase: bool = False) -> None:
        """Mark the triplets that stay, (r,) bool, and take the others out of ΔW.

        Their λ becomes zero; where Λ is not trained, their column of P does. They keep their Q (and P), so a dropped
        triplet can come back at a later allocation; with ``erase`` P and Q become zero, and with them every gradient
        the triplet would have. Where neither lam nor Q is trained ("lora-fa", "lora-xs"), a triplet that comes back
        begins again with P = 0, or with a row and a column of the core that are zero.
        """
        if self.init in ("lora-fa", "lora-xs"):
            stays = self.kept & kept.to(self.kept.device)
            if self.core is None:
                self.P.mul_(stays)
            else:
                self.core.mul_(stays[:, None] & stays)
            self.lam.copy_(kept)
        self.kept.copy_(kept)
        if self.sized_by_factors:
            self.P.mul_(self.kept)
        else:
            self.lam.mul_(self.kept)
        if erase:
            self.P.mul_(self.kept)
            self.Q.mul_(self.kept[:, None])

    @torch.no_grad()
    def select(self, index: torch.Tensor) -> None:
        """Hold only the triplets ``index`` (k,) from now on; the parameters stay the same objects."""
        for _, parameter, dims in self.factors():
            replace_data(parameter, selected(parameter.data, dims, index))
        self.kept = self.kept.index_select(0, index)
        self.resized()

    @torch.no_grad()
    def resize(self, rank: int) -> None:
        """Hold exactly ``rank`` triplets, contents undefined: room for loaded weights."""
        for _, parameter, dims in self.factors():
            shape = [rank if dim in dims else size for dim, size in enumerate(parameter.shape)]
            replace_data(parameter, parameter.data.new_empty(shape))
        self.kept = self.kept.new_ones(rank)
        self.resized()


def selected(tensor: torch.Tensor, dims: Iterable[int], index: torch.Tensor) -> torch.Tensor:
    """The triplets ``index`` (k,) of a tensor whose dimensions ``dims`` count triplets."""
    for dim in dims:
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def replace_data(parameter: torch.Tensor, data: torch.Tensor) -> None:
    """Give ``parameter`` new contents of another shape; it stays the same object.

    A graph that is still referenced (a loss someone holds on to) keeps the parameter's gradient
    accumulator alive, and with it the old shape. torch forgets the accumulator when the type
    changes, so the contents pass through another dtype.
    """
    parameter.grad = None
    parameter.data = data.new_empty(0, dtype=torch.float64 if data.dtype != torch.float64 else torch.float32)
    parameter.data = data
