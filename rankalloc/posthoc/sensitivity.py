"""How the loss changes with the singular values of a finished adapter, measured on batches; the model stays as it is.

With ΔW = Σ σᵢ uᵢvᵢᵀ and G = ∂L/∂ΔW, ∂L/∂σᵢ = uᵢᵀ G vᵢ. ΔW is never formed: with P and Q the factors, it follows from
∂L/∂P, which autograd has anyway.

Cost: a forward and a backward pass for each batch, r² numbers a layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.adapter_set import Adapters
from ..errors import ConfigError, RankallocError
from ..layers.batches import evaluating, on_device
from ..lowrank import Factors, decompose
from .calibration import Batch, attached, model_loss

_DRIVEN = "save them, and give sensitivities the plain model and the folder"


@dataclass(frozen=True)
class Sensitivity:
    """How the loss changes with the singular values of one layer: σ·∂L/∂σ, (r,) float64, by falling σ.

    Attributes:
        mean: over batches, with its sign.
        size: the mean of its absolute value.
        sigma: the singular values that it was measured at.
    """

    mean: torch.Tensor
    size: torch.Tensor
    sigma: torch.Tensor


def sensitivities(
    model: nn.Module,
    adapter: Adapters | str | os.PathLike,
    batches: Iterable[Batch],
    *,
    loss: Callable[[nn.Module, Batch], torch.Tensor] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Sensitivity]:
    """Measure how the loss changes with each singular value of a finished adapter; the model is afterwards as it was.

    Args:
        model: without adapters if ``adapter`` is a folder, else the model that has them.
        adapter: the folder that will be refined, or the same adapter loaded by :func:`rankalloc.load`.
        batches: mappings of tensors that the model is called with.
        loss: turns (model, batch) into a scalar; None takes the ``loss`` of the model's output.
        progress: called with the number of batches done.

    Raises:
        ConfigError: there are no batches.
        RankallocError: the model returns no loss, or a gradient is not finite.
    """
    device = next(model.parameters()).device
    means: dict[str, torch.Tensor] = {}
    sizes: dict[str, torch.Tensor] = {}
    count = 0
    with attached(model, adapter) as adapters, evaluating(model):
        layers = {name: each for name, each in adapters.own(_DRIVEN).items() if each.rank}
        turns = {name: _Turn.of(each) for name, each in layers.items()}
        for batch in batches:
            value = (loss or model_loss)(model, on_device(batch, device))
            # autograd.grad leaves the parameters' own gradients as they are
            found = torch.autograd.grad(value, [each.P for each in layers.values()], allow_unused=True)
            for (name, each), gradient in zip(layers.items(), found, strict=True):
                seen = turns[name](each, torch.zeros_like(each.P) if gradient is None else gradient)
                if not torch.isfinite(seen).all():
                    raise RankallocError(f"the gradients of {name} are not finite on batch {count + 1}")
                means[name] = means.get(name, 0) + seen
                sizes[name] = sizes.get(name, 0) + seen.abs()
            count += 1
            if progress is not None:
                progress(count)
    if not count:
        raise ConfigError("sensitivities need at least one batch")
    return {name: Sensitivity(means[name] / count, sizes[name] / count, turns[name].sigma) for name in means}


@dataclass(frozen=True)
class _Turn:
    """Maps ∂L/∂P (d_out, r) of an adapter to σ·∂L/∂σ.

    ∂L/∂P = G Qᵀ diag(d), d = s·λ. With P·left = U Σ^½ and right·Q = Σ^½Vᵀ (:class:`rankalloc.lowrank.Spectrum`),
    σᵢ uᵢᵀ G vᵢ = leftᵢᵀ (Pᵀ ∂L/∂P) diag(1/d) rightᵢᵀ; where d is 0, so is that column of ``right``.
    """

    left: torch.Tensor
    right: torch.Tensor
    sigma: torch.Tensor

    @classmethod
    def of(cls, adapter: Adapter) -> _Turn:
        factors = Factors(adapter.P.detach(), adapter.Q.detach(), adapter.lam.detach(), adapter.scaling)
        spectrum, diagonal = decompose(factors), factors.diagonal()
        return cls(spectrum.left, spectrum.right * torch.where(diagonal == 0, 0.0, 1 / diagonal), spectrum.sigma)

    def __call__(self, adapter: Adapter, gradient: torch.Tensor) -> torch.Tensor:
        core = (adapter.P.detach().T.double() @ gradient.double()).cpu()
        return ((self.left.T @ core) * self.right).sum(1)
