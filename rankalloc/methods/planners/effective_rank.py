"""Effective rank: ranks ∝ exp(H(σ / Σσ)), σ the singular values of E[∂L/∂W] and H the entropy in nats.

It counts the directions in which the loss pulls at a layer (Roy and Vetterli, EUSIPCO 2007), taken as the rank that the
layer can use, as RaLoRA does.

Cost: one forward and backward pass per batch, 4 bytes of host memory for each adapted weight, and one SVD of each
weight's size, O(d_in · d_out · min(d_in, d_out)). Known weakness: blind to size; a layer whose gradient is small and
noisy has the highest effective rank.
"""

from __future__ import annotations

from ...lowrank import effective_rank
from .base import Choose, Planner, Scores, constant
from .gradients import weight_gradients
from .probe import Probe


class EffectiveRank(Planner):
    """One score per layer, the effective rank of its mean gradient; see the module docstring."""

    name = "effective-rank"

    def scores(self, probe: Probe, choose: Choose) -> Scores:
        gradients = weight_gradients(probe).mean
        return constant(probe, {name: effective_rank(gradient) for name, gradient in gradients.items()})
