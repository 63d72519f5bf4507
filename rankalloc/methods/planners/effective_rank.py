"""Effective rank: ranks ∝ exp(H(σ / Σσ)), σ the singular values of E[∂L/∂W] and H the entropy in nats.

In how many directions the loss pulls at a layer (Roy and Vetterli, EUSIPCO 2007), taken as the rank it can
use, as RaLoRA does.

Cost: one forward and backward pass a batch, 4 bytes of host memory for each adapted weight, and one SVD of
each weight's size, O(d_in · d_out · min(d_in, d_out)). Known weakness: blind to size; a layer whose gradient is
small and noisy has the highest effective rank.
"""

from __future__ import annotations

import torch

from .base import Choose, Planner, Scores, constant
from .gradients import weight_gradients
from .probe import Probe


class EffectiveRank(Planner):
    """One score a layer, the effective rank of its mean gradient; see the module docstring."""

    name = "effective-rank"

    def scores(self, probe: Probe, choose: Choose) -> Scores:
        gradients = weight_gradients(probe).mean
        return constant(probe, {name: effective_rank(gradient) for name, gradient in gradients.items()})


def effective_rank(matrix: torch.Tensor) -> float:
    """exp(entropy of the normalised singular values) of a matrix: 1 to min(shape), and 0 for a zero matrix."""
    values = torch.linalg.svdvals(matrix.double())
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return torch.exp(-(shares * shares.log()).sum()).item()
