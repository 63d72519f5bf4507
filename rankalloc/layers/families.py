"""Adapters that read one tensor, as q, k and v of an attention do, or gate and up of a feed-forward layer, computed
together: several skinny products become a wider one, and ∂x is formed once.

Which adapters are siblings is seen, not guessed from names: at its first training call an adapter joins the one
that was called just before it with the same tensor. From then on the first of a family computes for all, and the
others pick up what is theirs. When one comes for something else, or does not come, the family ends, and each
computes for itself again.

Only calls of the fused layer take part, while a graph is built, without dropout, and with no hook on what the graph
saves: checkpointing without reentrance compares what a layer saves on both of its passes.

Weakness: sums are rounded otherwise than by each layer alone. A run that goes on from a checkpoint must therefore
begin with the families it had (:func:`known`, :func:`remember`; the controller's state holds them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import ref

import torch

from .fused import Layer, compute_dtype, fused_linear

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter

# the hooks that would be called on what the graph saves; torch has no public name for this question
_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


class Family:
    """Adapters in the order of their calls, and what the first has computed for those still to come."""

    def __init__(self) -> None:
        # an adapter holds its family; were the reverse true, a model would outlive its last reference
        self._members: list[ref[Adapter]] = []
        self.seen: torch.Tensor | None = None
        self.version = 0
        self.waiting: dict[Adapter, tuple[Layer, torch.Tensor]] = {}

    @property
    def members(self) -> list[Adapter]:
        return [member for one in self._members if (member := one()) is not None]

    def add(self, adapter: Adapter) -> None:
        self._members.append(ref(adapter))
        adapter.family = self

    def after(self, adapter: Adapter) -> list[Adapter]:
        """Those for whom ``adapter`` computes: the others, if it is the first that holds any triplet."""
        if len(self._members) == 1:
            return []
        holding = [member for member in self.members if member.rank]
        return holding[1:] if holding and holding[0] is adapter else []

    def leave(self, outputs: dict[Adapter, tuple[Layer, torch.Tensor]], x: torch.Tensor) -> None:
        self.seen, self.version, self.waiting = x, x._version, outputs

    def fetch(self, adapter: Adapter, layer: Layer, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """What was computed for ``adapter``; None, and the end of the family, when it was for something else."""
        kept, out = self.waiting.pop(adapter, (None, None))
        same = self.seen is x and self.version == x._version and _same(kept, layer) and out.dtype == dtype
        if same and _takes_part():
            if not self.waiting:
                self.seen = None
            return out
        self.end()
        return None

    def end(self) -> None:
        self.seen, self.waiting = None, {}
        for member in self.members:
            Family().add(member)


def output(adapter: Adapter, layer: Layer, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Base and update of ``adapter`` on x, (..., d_out), for which :func:`rankalloc.layers.fused.compute_dtype` gave
    ``dtype``."""
    family = adapter.family
    if family is not None and family.seen is not None:
        out = family.fetch(adapter, layer, x, dtype)
        if out is not None:
            return out
    elif _takes_part() and _whole(adapter, layer):
        if family is None:
            _meet(adapter, x)
        elif others := family.after(adapter):
            layers = {other: other.layer() for other in others}
            if all(_whole(o, part) and compute_dtype(part, x) == dtype for o, part in layers.items()):
                out, *rest = fused_linear([layer, *layers.values()], x, dtype)
                family.leave(dict(zip(layers, zip(layers.values(), rest, strict=True), strict=True)), x)
                return out
    return fused_linear([layer], x, dtype)[0]


def known(adapters: Mapping[str, Adapter]) -> list[list[str]]:
    """The families, as names in the order of their calls; an adapter that was not called yet is in none."""
    names = {adapter: name for name, adapter in adapters.items()}
    families = {id(a.family): a.family for a in adapters.values() if a.family is not None}
    return [[names[member] for member in family.members if member in names] for family in families.values()]


def remember(adapters: Mapping[str, Adapter], families: Sequence[Sequence[str]]) -> None:
    """Give ``adapters`` the families that :func:`known` told."""
    for names in families:
        family = Family()
        for name in names:
            family.add(adapters[name])


class _Last:
    """Who was called last for the first time, and with what."""

    adapter: ref[Adapter] | None = None
    x: ref[torch.Tensor] | None = None
    version = 0


def _meet(adapter: Adapter, x: torch.Tensor) -> None:
    last = _Last.adapter() if _Last.adapter is not None else None
    if last is not None and last.family is not None and _Last.x() is x and _Last.version == x._version:
        last.family.add(adapter)
    else:
        Family().add(adapter)
    _Last.adapter, _Last.x, _Last.version = ref(adapter), ref(x), x._version


def _same(one: Layer | None, other: Layer) -> bool:
    """Whether nothing was exchanged between two calls."""
    return one is not None and one.base is other.base and one.scaling == other.scaling and all(
        a is b for a, b in zip(one.factors, other.factors, strict=True)
    )


def _takes_part() -> bool:
    """Whether a graph is built, and nobody watches what it saves."""
    return torch.is_grad_enabled() and _saving_hooks(False) is None


def _whole(adapter: Adapter, layer: Layer) -> bool:
    """Whether the adapter trains with the factors as they are: all of their triplets, and no dropout of its own."""
    # not adapter.P: an attribute of a module costs as much as a small operator
    p, _, q = layer.factors
    modules, parameters = adapter._modules, adapter._parameters
    whole = p is parameters["P"] and q is parameters["Q"]
    return adapter.training and modules["dropout"] is None and whole
