"""Second moments of a layer's inputs and output gradients on the user's data, so that a shrink is weighed by the task.

C = E[xxᵀ] over tokens and G = E[ggᵀ], with g the gradient of the loss at the layer's output (the empirical Fisher's,
K-FAC: Martens and Grosse, 2015, arXiv 1503.05671). A shrink needs only QCQᵀ and PᵀGP, so each batch is projected on the
adapter's factors at once, (Qx)(Qx)ᵀ and (Pᵀg)(Pᵀg)ᵀ: exact, with 2 r² numbers per layer instead of d_in² + d_out².
Damping adds a share of the moment's mean diagonal to its diagonal.

Cost: a forward and a backward pass for each batch (forward alone with ``inputs_only``), and 2 r² + 2 numbers per layer.
Known weakness: inputs and gradients are taken as independent, and the gradients of few batches are few directions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
from ..storage.fitting import at_full_rank
from ..storage.loading import load
from ..storage.reading import FinishedAdapter
from .metric import KroneckerMetric

Batch = Mapping[str, torch.Tensor]

_DRIVEN = "save them, and give calibrate the plain model and the folder"


@dataclass
class Calibration(KroneckerMetric):
    """Moments projected on one adapter's factors, made by :func:`calibrate`. They fit that adapter and no other.

    ``inputs`` and ``outputs`` hold (r, r) matrices, ``levels`` the mean diagonals of C and G.
    """

    levels: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    batches: int = 0

    def grams(self, name: str, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """(PᵀGP, QCQᵀ), (r, r) each in float64. Raises ConfigError when ``factors`` are those of another adapter."""
        used = (factors.Q != 0).any(1) | (factors.P != 0).any(0)
        # a rank above the layer's shorter side is lowered when the adapter is loaded, and the moments with it
        measured = at_full_rank(Factors(
            factors.P[:, used], factors.Q[used], None if factors.lam is None else factors.lam[used], factors.scaling
        ))
        if name not in self.inputs or len(self.inputs[name]) != measured.rank:
            raise ConfigError(f"this calibration was made on another adapter: it does not fit {name}")
        of_inputs, of_outputs = self.levels[name]
        return (
            self._spread(factors.P.T, measured.P.T, used, self.outputs.get(name), of_outputs),
            self._spread(factors.Q, measured.Q, used, self.inputs.get(name), of_inputs),
        )

    def _spread(
        self, rows: torch.Tensor, measured: torch.Tensor, used: torch.Tensor, moment: torch.Tensor | None, level: float
    ) -> torch.Tensor:
        """The damped moment (r, r) of all ``rows`` (r, d), from the ``moment`` of the rows that were measured."""
        rows, measured = rows.detach().cpu().double(), measured.detach().cpu().double()
        if len(measured) < int(used.sum()):
            # P Λ Q is the same for Q and for its projection on the row space of ΔW, which the measured rows span; so
            # is the best truncation, and the measured moment says all about the projection (likewise for P)
            turn = rows @ torch.linalg.pinv(measured)
            rows, gram = turn @ measured, None if moment is None else turn @ moment.double() @ turn.T
        elif moment is not None:
            gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
            gram[used.nonzero(), used.nonzero().T] = moment.double()
        else:
            gram = None
        plain = rows @ rows.T
        return plain if gram is None else gram + self.damping * level * plain


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
    """Measure the moments of every adapted layer; afterwards the model is as it was.

    Args:
        model: without adapters if ``adapter`` is a folder, else the model that has them.
        adapter: the folder that will be shrunk, or the same adapter loaded by :func:`rankalloc.load`.
        batches: mappings of tensors that the model is called with; positions masked by ``attention_mask`` do not count
            as inputs.
        inputs_only: leave G = 1, which weighs the squared change of each layer's output, without a backward pass.
        damping: this share of a moment's mean diagonal is added to its diagonal.
        loss: turns (model, batch) into a scalar; None takes the ``loss`` of the model's output.
        progress: called with the number of batches done.

    Raises:
        ConfigError: there are no batches, or a number is out of its range.
        RankallocError: the model returns no loss, or a moment is not finite.
    """
    damping = number("damping", damping)
    device = next(model.parameters()).device
    count = 0
    with attached(model, adapter) as adapters, evaluating(model), ExitStack() as hooks:
        watches = {name: _Watch(each, inputs_only) for name, each in adapters.own(_DRIVEN).items()}
        for watch in watches.values():
            hooks.callback(watch.handle.remove)
        for batch in batches:
            batch = on_device(batch, device)
            for watch in watches.values():
                watch.mask = batch.get("attention_mask")
            with torch.set_grad_enabled(not inputs_only):
                value = (loss or model_loss)(model, batch)
            if not inputs_only:
                # autograd.grad leaves the parameters' own gradients as they are; the hooks see the activations'
                torch.autograd.grad(value, [a.P for a in adapters if a.rank], allow_unused=True)
            count += 1
            if progress is not None:
                progress(count)
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


@contextmanager
def attached(model: nn.Module, adapter: Adapters | str | os.PathLike) -> Iterator[Adapters]:
    """The adapters of a folder on ``model``, which is afterwards as it was; adapters that are on it stay there."""
    if isinstance(adapter, Adapters):
        yield adapter
        return
    own = {name: value.clone() for name, value in _heads(model, adapter).items()}
    adapters = load(model, adapter)
    try:
        yield adapters
    finally:
        detach(adapters).load_state_dict(own, strict=False)


def _heads(model: nn.Module, folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The model's own weights that loading the adapter replaces."""
    state = model.state_dict()
    return {name: state[name] for name in FinishedAdapter(folder).heads if name in state}


def model_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The ``loss`` of the model's output for a batch. Raises RankallocError when it has none."""
    value = getattr(model(**batch), "loss", None)
    if value is None:
        raise RankallocError("the model returned no loss for a batch; give batches with labels, or loss=")
    return value


class _Watch:
    """Inputs and output gradients of one adapter, projected on its factors and summed in float64."""

    def __init__(self, adapter: Adapter, inputs_only: bool) -> None:
        self.adapter, self.inputs_only = adapter, inputs_only
        self.mask: torch.Tensor | None = None
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
