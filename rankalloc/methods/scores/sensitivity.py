"""AdaLoRA's importance: smoothed sensitivity times its uncertainty.

Zhang et al., ICLR 2023 (arXiv 2303.10512), eqs. 8-11. For every entry w of P, lam and Q:

    I = |w · ∂L/∂w|,   Ī ← β₁ Ī + (1 − β₁) I,   Ū ← β₂ Ū + (1 − β₂) |I − Ī|,   s(w) = Ī · Ū

and for triplet i:  S_i = s(lam_i) + mean_j s(P_ji) + mean_j s(Q_ij).

State: 2 × the adapter. Known weakness: P and Q are only nearly orthonormal, so S depends on the
basis a triplet happens to be in. Multiplying all gradients by one constant leaves the order as it
is, so clipping and the way a loss is averaged over micro-batches do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...adapters.triplets import Triplets
from ...options import number
from .base import Score


class Sensitivity(Score):
    """Sensitivity × uncertainty; the formula is in the module docstring.

    Raises:
        ConfigError: beta1 or beta2 outside (0, 1).
    """

    name = "sensitivity"

    def __init__(self, adapters: Sequence[Triplets], beta1: float = 0.85, beta2: float = 0.85) -> None:
        super().__init__(adapters)
        self.beta1, self.beta2 = number("beta1", beta1, 0, 1, ends=False), number("beta2", beta2, 0, 1, ends=False)
        self.weights = [w for a in self.adapters for w in (a.P, a.lam, a.Q)]
        self.sensitivity = [torch.zeros_like(w, dtype=torch.float32) for w in self.weights]
        self.uncertainty = [torch.zeros_like(w, dtype=torch.float32) for w in self.weights]

    @torch.no_grad()
    def observe(self) -> None:
        # a layer that took no part in this step has no gradient: its sensitivity was zero
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights]
        now = torch._foreach_mul([w.float() for w in self.weights], grads)
        torch._foreach_abs_(now)
        torch._foreach_mul_(self.sensitivity, self.beta1)
        torch._foreach_add_(self.sensitivity, now, alpha=1 - self.beta1)
        torch._foreach_sub_(now, self.sensitivity)
        torch._foreach_abs_(now)
        torch._foreach_mul_(self.uncertainty, self.beta2)
        torch._foreach_add_(self.uncertainty, now, alpha=1 - self.beta2)

    def of_entries(self) -> Sequence[torch.Tensor]:
        """s(w) of every entry, in the order of the weights."""
        return torch._foreach_mul(self.sensitivity, self.uncertainty)

    @torch.no_grad()
    def values(self) -> Sequence[torch.Tensor]:
        entry = self.of_entries()
        return [entry[i].mean(0) + entry[i + 1] + entry[i + 2].mean(1) for i in range(0, len(entry), 3)]

    def tensors(self) -> dict[str, torch.Tensor]:
        state = {}
        for index in range(len(self.adapters)):
            for offset, factor in enumerate(("P", "lam", "Q")):
                state[f"sensitivity.{index}.{factor}"] = self.sensitivity[3 * index + offset]
                state[f"uncertainty.{index}.{factor}"] = self.uncertainty[3 * index + offset]
        return state
