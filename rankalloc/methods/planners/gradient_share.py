"""Gradient share: ranks ∝ ‖E[∂L/∂W]‖_F of each layer.

It measures how strongly the loss pulls at a layer before anything has been learned; full-gradient methods start from
the same quantity (LoRA-GA, arXiv 2407.05000; GoRA, arXiv 2502.12171, without its factor W).

Cost: one forward and backward pass per batch, 4 bytes of host memory for each adapted weight. Known weakness: it is the
gradient of one step; the strongest pull at first may be learned in a few steps, with few directions.
"""

from __future__ import annotations

from .base import Choose, Planner, Scores, constant
from .gradients import weight_gradients
from .probe import Probe


class GradientShare(Planner):
    """One score per layer, the Frobenius norm of its mean gradient; see the module docstring."""

    name = "gradient-norm"

    def scores(self, probe: Probe, choose: Choose) -> Scores:
        gradients = weight_gradients(probe).mean
        return constant(probe, {name: gradient.norm().item() for name, gradient in gradients.items()})
