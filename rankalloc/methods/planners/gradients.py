"""The gradient of the loss with respect to each full weight, without making a weight trainable: G = E[∂L/∂W].

Each layer's gradient is computed during the backward pass, as the product of its outputs' gradient and its inputs, and
accumulated in host memory: 4 bytes for each adapted weight there, and one layer's gradient at a time on the model's
device, in addition to the activations that any backward pass keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import RankallocError
from .probe import Probe


@dataclass(frozen=True)
class Gradients:
    """``mean``: {name: E[∂L/∂W]}, (d_out, d_in) float32 on the CPU; ``loss``: the mean loss."""

    mean: dict[str, torch.Tensor]
    loss: float


def weight_gradients(probe: Probe) -> Gradients:
    """The mean gradient over all batches of the probe; zero for a layer that did not take part.

    Raises:
        RankallocError: a gradient is not finite.
    """
    sums: dict[str, torch.Tensor] = {}
    for name in probe.targets:
        d_in, d_out = probe.shape(name)
        sums[name] = torch.zeros(d_out, d_in)

    def watch(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.detach()

        def add(grad: torch.Tensor) -> None:
            rows = grad.detach().reshape(-1, grad.shape[-1]).float()
            sums[name].add_((rows.T @ x.reshape(-1, x.shape[-1]).float()).cpu())

        if not y.requires_grad:
            # the base is frozen: the graph begins here. A sum is not a leaf, so the model may change it in place
            y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
        if y.requires_grad:
            y.register_hook(add)
        return y

    total = 0.0
    with probe.hooked(watch):
        for index in range(len(probe.batches)):
            loss = probe.loss(index)
            total += loss.item()
            probe.backward(loss, index)
    for name, gradient in sums.items():
        gradient.div_(len(probe.batches))
        if not torch.isfinite(gradient).all():
            raise RankallocError(
                f"the gradient of {name} is not finite: ranks cannot be planned from it; check the batches, or load "
                "the model in a wider dtype than float16"
            )
    return Gradients(sums, total / len(probe.batches))
