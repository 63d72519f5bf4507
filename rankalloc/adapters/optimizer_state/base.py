"""What a format of optimizer state is: it reads one tensor that an optimizer keeps for one factor of an adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Verb = Literal["select", "turn", "forget"]

Turn = Callable[[str, bool, torch.dtype], torch.Tensor]
"""(factor "P", "lam" or "Q", squared, dtype) -> what its gradient is multiplied by, (r, r): "P" and "lam" on the
right, "Q" on the left."""


@dataclass(frozen=True)
class Entry:
    """One tensor in an optimizer's state.

    Attributes:
        optimizer: whose state it is.
        state: everything the optimizer keeps for the parameter; ``state[key]`` is the tensor.
        factor: "P", "lam", "Q" or "core".
        parameter: the factor itself.
        dims: the dimensions of the parameter that count triplets: one, or both of the core, which can neither turn nor
            forget.
    """

    optimizer: torch.optim.Optimizer
    state: dict[str, Any]
    key: str
    factor: str
    parameter: torch.Tensor
    dims: tuple[int, ...]

    @property
    def value(self) -> torch.Tensor:
        return self.state[self.key]

    @property
    def has_parameter_shape(self) -> bool:
        return self.value.shape == self.parameter.shape

    def along_triplets(self, triplets: torch.Tensor) -> tuple[slice | torch.Tensor, ...]:
        """An index that takes ``triplets`` (r,) bool from a tensor of the parameter's shape."""
        return (*[slice(None)] * self.dims[0], triplets.to(self.value.device))


class Format(ABC):
    """How one kind of optimizer keeps what it remembers of a factor's gradients.

    A new format is one file with a subclass and one line in :data:`rankalloc.adapters.optimizer_state.FORMATS`. The
    first format that claims an entry handles it.
    """

    @abstractmethod
    def claims(self, entry: Entry) -> bool:
        """Whether the entry is in this format."""

    def supports(self, verb: Verb, entry: Entry) -> bool:
        """Whether this entry can follow ``verb``."""
        return True

    @abstractmethod
    def select(self, entry: Entry, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """New values, by key of ``entry.state``, when only the triplets ``index`` (k,) stay; changes nothing."""

    @abstractmethod
    def turned(self, entry: Entry, turn: Turn) -> dict[str, torch.Tensor]:
        """New values, by key, in the basis that ``turn`` leads to; changes nothing."""

    @abstractmethod
    def forget(self, entry: Entry, triplets: torch.Tensor) -> None:
        """Remember nothing of ``triplets`` (r,) bool any more, as if they had just been created."""


def multiplied(entry: Entry, turn: Turn, squared: bool, old: torch.Tensor) -> torch.Tensor:
    """``old``, in the parameter's shape, in the new basis."""
    matrix = turn(entry.factor, squared, old.dtype)
    return matrix @ old if entry.factor == "Q" else old @ matrix
