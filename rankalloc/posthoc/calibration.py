"""Second moments of a layer's inputs and output gradients on the user's data, for a shrink that the task weighs.

C = E[xxᵀ] over tokens and G = E[ggᵀ], g the gradient of the loss at the layer's output (the empirical Fisher's,
K-FAC: Martens and Grosse, 2015, arXiv 1503.05671). A shrink needs of them only QCQᵀ and PᵀGP, so each batch is
projected on the adapter's own factors at once, (Qx)(Qx)ᵀ and (Pᵀg)(Pᵀg)ᵀ: exact, and 2 r² numbers a layer instead of
d_in² + d_out². Damping adds a share of the moment's mean diagonal to its diagonal.

Cost: a forward and a backward pass for each batch (forward alone with ``inputs_only``), state 2 r² + 2 numbers a layer.
Known weakness: inputs and gradients are taken as independent, and the gradients of few batches are few directions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.adapter_set import Adapters
from ..adapters.attaching import detach
from ..errors import ConfigError, RankallocError
from ..layers.batches import evaluating, on_device
from ..lowrank import Factors
from ..options import number
from ..storage.loading import load
from ..storage.reading import FinishedAdapter
from .metric import KroneckerMetric

Batch = Mapping[str, torch.Tensor]


@dataclass
class Calibration(KroneckerMetric):
    """Moments seen through one adapter's factors. ``inputs`` and ``outputs`` hold (r, r) matrices, ``levels`` the mean
    diagonals of C and G. Made by :func:`calibrate`; it fits the adapter it was made on and no other."""

    levels: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    batches: int = 0

    def grams(self, name: str, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        used = (factors.Q != 0).any(1) | (factors.P != 0).any(0)
        if name not in self.inputs or len(self.inputs[name]) != int(used.sum()):
            raise ConfigError(f"this calibration was made on another adapter: it does not fit {name}")
        found = []
        for rows, moments, level in zip(
            (factors.P.T, factors.Q), (self.outputs, self.inputs), reversed(self.levels[name]), strict=True
        ):
            rows = rows.detach().cpu().double()
            plain = rows @ rows.T
            if name not in moments:
                found.append(plain)
                continue
            gram = torch.zeros_like(plain)
            gram[used.nonzero(), used.nonzero().T] = moments[name].double()
            found.append(gram + self.damping * level * plain)
        return found[0], found[1]


def calibrate(
    model: nn.Module,
    adapter: Adapters | str | os.PathLike,
    batches: Iterable[Batch],
    *,
    inputs_only: bool = False,
    damping: float = 0.01,
    loss: Callable[[nn.Module, Batch], torch.Tensor] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Calibration:
    """Measure the moments of every adapted layer; the model is as it was afterwards.

    Args:
        model: as it was before the adapter was attached, or with it.
        adapter: the folder that will be shrunk, or the same adapter loaded by :func:`rankalloc.load`.
        batches: mappings of tensors that the model is called with; positions that ``attention_mask`` masks are left
            out of the inputs.
        inputs_only: leave G = 1: the squared change of each layer's output, without a backward pass.
        damping: this share of a moment's mean diagonal is added to its diagonal.
        loss: (model, batch) to a scalar; None for the ``loss`` of the model's own output.
        progress: called with the number of batches done.

    Raises:
        ConfigError: there are no batches, or a number is out of its range.
        RankallocError: the model returns no loss, or a moment is not finite.
    """
    damping = number("damping", damping)
    loaded = not isinstance(adapter, Adapters)
    own = {name: value.clone() for name, value in _heads(model, adapter).items()} if loaded else {}
    adapters = load(model, adapter) if loaded else adapter
    device = next(model.parameters()).device
    watches = {name: _Watch(each, inputs_only) for name, each in adapters.modules.items()}
    count = 0
    try:
        with evaluating(model), ExitStack() as hooks:
            for watch in watches.values():
                hooks.callback(watch.handle.remove)
            for batch in batches:
                batch = on_device(batch, device)
                for watch in watches.values():
                    watch.mask = batch.get("attention_mask")
                with torch.set_grad_enabled(not inputs_only):
                    value = _loss(model, batch) if loss is None else loss(model, batch)
                if not inputs_only:
                    # gradients of activations alone: the parameters' own are left as they are
                    torch.autograd.grad(value, [a.P for a in adapters if a.rank], allow_unused=True)
                count += 1
                if progress is not None:
                    progress(count)
    finally:
        if loaded:
            detach(adapters).load_state_dict(own, strict=False)
    if not count:
        raise ConfigError("calibration needs at least one batch")
    for name, watch in watches.items():
        if not all(torch.isfinite(part).all() for part in (watch.inputs, watch.outputs)):
            raise RankallocError(f"the inputs or gradients of {name} are not finite on these batches")
    outputs = {} if inputs_only else {name: watch.outputs / max(1, watch.seen) for name, watch in watches.items()}
    return Calibration(
        {name: watch.inputs / max(1, watch.tokens) for name, watch in watches.items()}, outputs, damping,
        levels={name: watch.levels for name, watch in watches.items()}, batches=count,
    )


def _heads(model: nn.Module, folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """What of the model's own weights loading the adapter replaces."""
    state = model.state_dict()
    return {name: state[name] for name in FinishedAdapter(folder).heads if name in state}


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    value = getattr(model(**batch), "loss", None)
    if value is None:
        raise RankallocError("the model returned no loss for a batch; give batches with labels, or loss=")
    return value


class _Watch:
    """What passes one adapter, projected on its factors and summed in float64."""

    def __init__(self, adapter: Adapter, inputs_only: bool) -> None:
        self.adapter, self.inputs_only, self.mask = adapter, inputs_only, None
        self.inputs = torch.zeros(adapter.rank, adapter.rank, dtype=torch.float64)
        self.outputs = torch.zeros_like(self.inputs)
        self.tokens = self.seen = 0
        self._sizes = [0.0, 0.0]
        self.handle = adapter.register_forward_hook(self._forward)

    @property
    def levels(self) -> tuple[float, float]:
        """Mean diagonals of C and G."""
        return (
            self._sizes[0] / max(1, self.tokens) / self.adapter.d_in,
            self._sizes[1] / max(1, self.seen) / self.adapter.d_out,
        )

    @torch.no_grad()
    def _forward(self, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        x = args[0].detach()
        if self.mask is not None and x.shape[:-1] == self.mask.shape:
            x = x[self.mask.bool()]
        x = x.reshape(-1, x.shape[-1])
        seen = (x.to(self.adapter.Q.dtype) @ self.adapter.Q.T).double().cpu()
        self.inputs += seen.T @ seen
        self._sizes[0] += float(x.double().square().sum())
        self.tokens += len(x)
        if not self.inputs_only and out.requires_grad:
            out.register_hook(self._backward)

    @torch.no_grad()
    def _backward(self, gradient: torch.Tensor) -> None:
        g = gradient.detach().reshape(-1, gradient.shape[-1])
        seen = (g.to(self.adapter.P.dtype) @ self.adapter.P).double().cpu()
        self.outputs += seen.T @ seen
        self._sizes[1] += float(g.double().square().sum())
        self.seen += len(g)
