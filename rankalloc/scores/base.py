"""What an importance score is: it watches gradients and says what each triplet is worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from ..adapter import Adapter


class Score(ABC):
    """An importance score over the triplets of all adapters.

    A new score is one file with a subclass and one line in ``rankalloc.scores.SCORES``.
    """

    name: ClassVar[str]

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = list(adapters)

    @abstractmethod
    def observe(self) -> None:
        """Take in the gradients now in ``.grad``: after backward, before the optimizer's step."""

    @abstractmethod
    def values(self) -> list[torch.Tensor]:
        """The score of each triplet, per adapter a tensor (r,); higher stays."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The state, under stable names; the tensors themselves, so that writing to them loads."""

    def state_bytes(self) -> int:
        """Size of the state in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def load_tensors(self, saved: dict[str, torch.Tensor]) -> None:
        """Take over a saved state of the same adapters. Raises KeyError for a missing tensor."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(saved[name])
