"""Gradient norm: how strongly the loss pulls at a triplet, whatever its present size.

The moving average of |∂L/∂lam_i| = s·|P_:iᵀ (∂L/∂ΔW) Q_i:ᵀ|: the part of the layer's full gradient that
lies along the triplet. State: r numbers a layer. Known weakness: a direction that is already learned no
longer pulls, and looks worthless.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import LambdaScore


class GradientNorm(LambdaScore):
    """Moving average of |∂L/∂lam|; see the module docstring."""

    name = "gradient-norm"
    any_basis = True

    def of_gradient(self, lam: list[torch.Tensor], grad: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        return torch._foreach_abs(grad)
