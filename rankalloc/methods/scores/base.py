"""The interface of importance scores: a score watches gradients and rates each triplet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from ...adapters.triplets import TRIPLET_DIMS, Triplets
from ...errors import RankallocError
from ...options import number
from .derivatives import derivatives


class Score(ABC):
    """An importance score over the triplets of all adapters.

    A new score is one file with a subclass and one line in ``rankalloc.methods.scores.SCORES``. Its state is
    whatever :meth:`tensors` returns; each tensor has one dimension that counts triplets.
    """

    name: ClassVar[str]
    any_basis: ClassVar[bool] = False
    """Whether it is meaningful for triplets whose basis stays as it was drawn (LoRA-FA, VeRA)."""

    def __init__(self, adapters: Sequence[Triplets]) -> None:
        self.adapters = list(adapters)

    def observe(self) -> None:  # noqa: B027 - a score without state has nothing to take in
        """Take in the gradients now in ``.grad``: after backward, before the optimizer's step."""

    @abstractmethod
    def values(self) -> Sequence[torch.Tensor]:
        """The score of each triplet, per adapter a tensor (r,); higher stays."""

    def arrays(self, names: Sequence[str], step: int) -> list[np.ndarray]:
        """:meth:`values` as float64 arrays (r,), fetched from the device at once.

        Raises:
            RankallocError: one is not finite; ``names`` and ``step`` say which and when.
        """
        values = self.values()
        exact = [v if v.dtype == torch.float64 else v.float() for v in values]
        joined = torch.cat(exact).cpu().double().numpy()  # the one synchronisation
        by_layer = np.split(joined, np.cumsum([len(v) for v in values])[:-1])
        if not np.isfinite(joined).all():
            broken = next(name for name, layer in zip(names, by_layer, strict=True) if not np.isfinite(layer).all())
            raise RankallocError(
                f"the scores of {broken} are not finite at step {step}: its adapter has diverged; lower the learning "
                "rate, or clip the gradients (max_grad_norm)"
            )
        return by_layer

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state, under names ``what.index.factor`` (factor P, lam or Q); the tensors themselves, so
        that writing to them loads. A tensor of factor P is (d_out, r), of Q (r, d_in), of lam (r,)."""
        return {}

    def state_bytes(self) -> int:
        """Size of the state in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def load_tensors(self, saved: dict[str, torch.Tensor]) -> None:
        """Take over a saved state of the same adapters. Raises KeyError for a missing tensor."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(saved[name])

    @torch.no_grad()
    def select(self, kept: Sequence[torch.Tensor]) -> None:
        """Keep the state of the triplets ``kept[i]`` (r,) bool of each adapter, when the others leave memory."""
        for name, tensor in self.tensors().items():
            index, dim = _place(name)
            where = kept[index].nonzero().flatten().to(tensor.device)
            tensor.data = tensor.data.index_select(dim, where)

    @torch.no_grad()
    def rebase(self, mixings: Sequence[torch.Tensor]) -> None:
        """Follow a change of basis: ``mixings[i]`` (r, r) is the share of each old triplet of adapter i
        (row) in each new one (column). A statistic becomes the average of those it came from."""
        for name, tensor in self.tensors().items():
            index, dim = _place(name)
            mixing = mixings[index].to(tensor.dtype)
            tensor.copy_(mixing.T @ tensor if dim == 0 and tensor.dim() == 2 else tensor @ mixing)


def _place(name: str) -> tuple[int, int]:
    """(index of the adapter, dimension that counts triplets) of a state tensor ``what.index.factor``."""
    _, index, factor = name.split(".")
    return int(index), TRIPLET_DIMS[factor]


class AveragedScore(Score):
    """A moving average over the steps of one number a triplet: r numbers of state a layer.

    Args:
        beta: decay of the average, in (0, 1).
    """

    def __init__(self, adapters: Sequence[Triplets], beta: float = 0.85) -> None:
        super().__init__(adapters)
        self.beta = number("beta", beta, 0, 1, ends=False)
        self.average = [torch.zeros_like(adapter.lam, dtype=torch.float32) for adapter in self.adapters]

    @abstractmethod
    def now(self) -> Sequence[torch.Tensor]:
        """What this step adds to the average, per adapter (r,) in float32."""

    @torch.no_grad()
    def observe(self) -> None:
        now = list(self.now())
        torch._foreach_mul_(self.average, self.beta)
        torch._foreach_add_(self.average, now, alpha=1 - self.beta)

    def values(self) -> Sequence[torch.Tensor]:
        return [average.clone() for average in self.average]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"average.{index}.lam": average for index, average in enumerate(self.average)}


class LambdaScore(AveragedScore):
    """A score that needs only Λ and its gradient."""

    @abstractmethod
    def of_gradient(self, lam: list[torch.Tensor], grad: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What is averaged over the steps, from lam and ∂L/∂lam, each per adapter (r,).

        Where Λ stays 1 and the factors hold the size, lam is σ = ‖P_i‖‖Q_i‖, and grad the derivative by σ with both
        directions held.
        """

    def now(self) -> Sequence[torch.Tensor]:
        sizes = [a.sizes() if a.sized_by_factors else a.lam.float() for a in self.adapters]
        return self.of_gradient(sizes, derivatives(self.adapters, sizes))
