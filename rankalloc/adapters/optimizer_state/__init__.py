"""What an optimizer remembers of an adapter's gradients, and how it follows when triplets leave, turn or come.

Three verbs, for the three things that an allocation does to triplets:

    select    triplets leave memory                 (:mod:`rankalloc.adapters.memory`)
    turn      the basis changes                     (:mod:`rankalloc.adapters.canonical`)
    forget    a slot gets a fresh triplet           (:mod:`rankalloc.methods.rules.fresh`)

and :func:`require_support` asks at the first step whether an optimizer can follow them. Optimizers keep their state in
different formats; :data:`FORMATS` lists those that are known, and a new one is one file and one line there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from torch import nn

from ...errors import RankallocError
from ..triplets import Triplets
from .base import Entry, Format, Turn, Verb
from .counts import Counts
from .elementwise import Elementwise
from .factored import Factored
from .packed import Packed

__all__ = ["FORMATS", "Entry", "Format", "Turn", "Verb", "forget", "require_support", "select", "turn", "unwrap"]

FORMATS: list[Format] = [Counts(), Packed(), Factored(), Elementwise()]
"""Known formats, the special ones first: the first that claims an entry handles it."""

_WAYS_OUT: dict[Verb, tuple[str, str]] = {
    "select": ("rankalloc cannot shrink", "use another optimizer or shrink=False"),
    "turn": ("cannot be carried to another basis", "use AdamW, Adafactor or SGD, or the option canonical=False"),
    "forget": ("cannot be cleared for a fresh triplet", "use AdamW, Adafactor or SGD"),
}


def unwrap(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, without accelerate's AcceleratedOptimizer around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def require_support(
    adapters: Iterable[Triplets], optimizer: torch.optim.Optimizer, verbs: Collection[Verb]
) -> None:
    """Make sure that the optimizer's state can follow ``verbs``; called at the first step, not when it is too late.

    Raises:
        RankallocError: the optimizer keeps something that cannot.
    """
    for adapter in adapters:
        for entry in _entries(adapter, optimizer):
            for verb in verbs:
                _format_of(entry, verb)


def select(adapter: Triplets, optimizer: torch.optim.Optimizer, index: torch.Tensor) -> Callable[[], None]:
    """A function that keeps the state of the triplets ``index`` (k,) alone; until it is called, nothing changes.

    Raises:
        RankallocError: the state cannot be sliced.
    """
    new = [
        (entry.state, _format_of(entry, "select").select(entry, index)) for entry in _entries(adapter, optimizer)
    ]

    def apply() -> None:
        for state, values in new:
            state.update(values)
        for factor in adapter.factors() if not len(index) else ():
            # it gets no gradient any more: not even a count of steps stays
            unwrap(optimizer).state.pop(factor.parameter, None)

    return apply


def turn(adapter: Triplets, optimizer: torch.optim.Optimizer, by: Turn) -> None:
    """Carry the state over to another basis of the same ΔW.

    Raises:
        RankallocError: the optimizer remembers something that cannot be carried over.
    """
    new = [(entry.state, _format_of(entry, "turn").turned(entry, by)) for entry in _entries(adapter, optimizer)]
    for state, values in new:
        for key, value in values.items():
            state[key].copy_(value)


def forget(adapter: Triplets, optimizer: torch.optim.Optimizer, triplets: torch.Tensor) -> None:
    """Clear the state of ``triplets`` (r,) bool, which begin anew.

    Raises:
        RankallocError: the optimizer keeps something in which one triplet cannot be cleared.
    """
    for entry in _entries(adapter, optimizer):
        _format_of(entry, "forget").forget(entry, triplets)


def _entries(adapter: Triplets, optimizer: torch.optim.Optimizer) -> Iterator[Entry]:
    optimizer = unwrap(optimizer)
    for name, parameter, dims in adapter.factors():
        state = optimizer.state.get(parameter, {})
        for key, value in list(state.items()):
            if isinstance(value, torch.Tensor):
                yield Entry(optimizer, state, key, name, parameter, dims)


def _format_of(entry: Entry, verb: Verb) -> Format:
    """The format that handles the entry. Raises RankallocError when none does."""
    for form in FORMATS:
        if form.claims(entry):
            if form.supports(verb, entry):
                return form
            break
    value = entry.value
    packed = "" if type(value) in (torch.Tensor, nn.Parameter) else f" ({type(value).__name__})"
    trouble, way_out = _WAYS_OUT[verb]
    raise RankallocError(
        f"{type(entry.optimizer).__name__} keeps {entry.key} of shape {tuple(value.shape)}{packed} for a parameter of "
        f"shape {tuple(entry.parameter.shape)}, which {trouble}; {way_out}"
    )
