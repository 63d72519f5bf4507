"""Adapters that read the same tensor (q, k and v of an attention layer, gate and up of a feed-forward layer) computed
together: several skinny products become one wider product, and ∂x is formed once.

Families are observed, not guessed from names: at its first training call an adapter joins the one called just before
it, if both read the same tensor. From then on the first member of a family computes the outputs of all and deposits
those of the others, which collect them when they are called. When a member is called with another input, or is not
called, the family ends and each adapter computes for itself again.

A call takes part only if it goes through the fused layer, builds a graph, uses no dropout, and no hook watches what the
graph saves: non-reentrant checkpointing compares what a layer saves in its two passes.

Weakness: sums are rounded differently than in each layer alone. A resumed run must therefore start with the families
it had (:func:`known`, :func:`remember`; the controller's state holds them).
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol
from weakref import ref

import torch

from .fused import Layer, compute_dtype, fused_linear

# the hooks that see what the graph saves; torch has no public name for this query
_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


class Member(Hashable, Protocol):
    """What a family needs to know about an adapter."""

    family: Family | None

    @property
    def rank(self) -> int:
        """How many triplets it holds."""

    def layer(self) -> Layer:
        """The frozen layer and the factors that a call uses now."""

    def uses_all_triplets(self, layer: Layer) -> bool:
        """Whether it trains, without dropout, with the factors in ``layer`` exactly as they are stored."""


class Family:
    """Adapters in the order of their calls, and the outputs that the first has computed for those still to come."""

    def __init__(self) -> None:
        # an adapter holds its family; if the family held the adapter too, a model would outlive its last reference
        self._members: list[ref[Member]] = []
        self.seen: torch.Tensor | None = None
        self.version = 0
        self.waiting: dict[Member, tuple[Layer, torch.Tensor]] = {}

    @property
    def members(self) -> list[Member]:
        return [member for one in self._members if (member := one()) is not None]

    def add(self, member: Member) -> None:
        self._members.append(ref(member))
        member.family = self

    def after(self, member: Member) -> list[Member]:
        """The members that ``member`` computes for: all others if it is the first with any triplet, else none."""
        if len(self._members) == 1:
            return []
        holding = [other for other in self.members if other.rank]
        return holding[1:] if holding and holding[0] is member else []

    def deposit(self, outputs: dict[Member, tuple[Layer, torch.Tensor]], x: torch.Tensor) -> None:
        """Keep the outputs on x until the members they belong to collect them."""
        self.seen, self.version, self.waiting = x, x._version, outputs

    def collect(self, member: Member, layer: Layer, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The output deposited for ``member``; if it belongs to another call, None, and the family ends."""
        kept, out = self.waiting.pop(member, (None, None))
        if (
            out is not None and self.seen is x and self.version == x._version and _same(kept, layer)
            and out.dtype == dtype and _takes_part()
        ):
            if not self.waiting:
                self.seen = None
            return out
        self.end()
        return None

    def end(self) -> None:
        """Make every member a family of one."""
        self.seen, self.waiting = None, {}
        for member in self.members:
            Family().add(member)


def output(member: Member, layer: Layer, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Base and update of ``member`` on x, (..., d_out), in the ``dtype`` that
    :func:`rankalloc.layers.fused.compute_dtype` gave."""
    family = member.family
    if family is not None and family.seen is not None:
        out = family.collect(member, layer, x, dtype)
        if out is not None:
            return out
    elif _takes_part() and member.uses_all_triplets(layer):
        if family is None:
            _meet(member, x)
        elif others := family.after(member):
            layers = {other: other.layer() for other in others}
            if all(o.uses_all_triplets(part) and compute_dtype(part, x) == dtype for o, part in layers.items()):
                out, *rest = fused_linear([layer, *layers.values()], x, dtype)
                family.deposit(dict(zip(layers, zip(layers.values(), rest, strict=True), strict=True)), x)
                return out
    return fused_linear([layer], x, dtype)[0]


def known(members: Mapping[str, Member]) -> list[list[str]]:
    """The families as lists of names, in the order of their calls; without adapters that were never called."""
    names = {member: name for name, member in members.items()}
    families = {id(m.family): m.family for m in members.values() if m.family is not None}
    return [[names[member] for member in family.members if member in names] for family in families.values()]


def remember(members: Mapping[str, Member], families: Sequence[Sequence[str]]) -> None:
    """Restore the families that :func:`known` returned."""
    for names in families:
        family = Family()
        for name in names:
            family.add(members[name])


class _PreviousCall(threading.local):
    """The member that this thread called last for the first time, and its input; each thread has its own."""

    member: ref[Member] | None = None
    x: ref[torch.Tensor] | None = None
    version = 0


_previous = _PreviousCall()


def _meet(member: Member, x: torch.Tensor) -> None:
    last = _previous.member() if _previous.member is not None else None
    same_input = _previous.x is not None and _previous.x() is x and _previous.version == x._version
    if last is not None and last.family is not None and same_input:
        last.family.add(member)
    else:
        Family().add(member)
    _previous.member, _previous.x, _previous.version = ref(member), ref(x), x._version


def _same(one: Layer | None, other: Layer) -> bool:
    """Whether nothing was exchanged between two calls."""
    return one is not None and one.base is other.base and one.scaling == other.scaling and all(
        a is b for a, b in zip(one.factors, other.factors, strict=True)
    )


def _takes_part() -> bool:
    """Whether a graph is built and no hook watches what it saves."""
    return torch.is_grad_enabled() and _saving_hooks(False) is None
