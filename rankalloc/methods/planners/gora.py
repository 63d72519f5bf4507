"""GoRA: ranks from |W ⊙ G|, and a start one step down the gradient (He et al., arXiv 2502.12171).

With G = E[∂L/∂W] over a few batches, a layer's importance is mean |W ⊙ G|, its share I_l of the sum over all
layers. The paper gives a layer round(b · I_l / √(d_in + d_out)) ranks, clipped; here ranks are proportional to
I_l / √(d_in + d_out) and meet the budget exactly, by largest remainders.

Adapters start at ΔW = P Q = −γ √(d_in / r) G Qᵀ (Q Qᵀ)⁻¹ Q: the projection of −G on the rows of Q, which are drawn as
in plain LoRA, scaled to make up for the norm that the projection loses, so that it is one step of gradient descent of
size γ. γ is halved until the mean loss over the same batches falls: published code has been seen to start uphill, and
no fixed step is safe for all models.

Cost: one forward and backward pass per batch, one or a few more forward passes for the start, and 4 bytes of host
memory for each adapted weight. Known weakness: W ⊙ G measures how much the loss depends on the existing weights, not
on the update to come; ΔW ≠ 0 before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...adapters.plan import Start
from ...layers.adaptable import full_weight
from ...options import number
from .base import Choose, Planner, Scores, constant
from .gradients import weight_gradients
from .probe import Probe, low_rank

_HALVINGS = 30


class GoRA(Planner):
    """One score per layer, I_l / √(d_in + d_out), and factors to start from; see the module docstring.

    Args:
        max_batches: how many batches to average gradients over.
        gamma: size γ of the first step, before any halving.
    """

    name = "gora"

    def __init__(self, max_batches: int = 8, gamma: float = 0.05) -> None:
        super().__init__(max_batches)
        self.gamma = number("gamma", gamma, ends=False)

    def scores(self, probe: Probe, choose: Choose) -> Scores:
        self.gradients = weight_gradients(probe)
        importance = {
            name: (full_weight(probe.targets[name]).float().cpu() * gradient).abs().mean().item()
            for name, gradient in self.gradients.mean.items()
        }
        total = sum(importance.values()) or 1.0
        return constant(probe, {n: share / total / sum(probe.shape(n)) ** 0.5 for n, share in importance.items()})

    @torch.no_grad()
    def initial(self, probe: Probe, ranks: Mapping[str, int]) -> dict[str, Start]:
        step = {}
        for name, rank in ranks.items():
            if rank:
                Q = probe.kaiming(name, rank)
                # G Qᵀ (Q Qᵀ)⁻¹ is the least-squares solution P of P Q = G
                P = -torch.linalg.lstsq(Q.double().cpu().T, self.gradients.mean[name].double().T).solution.T
                P = P * (probe.shape(name)[0] / rank) ** 0.5
                step[name] = Start(P.float().to(Q.device), Q)
        gamma = self.gamma
        for _ in range(_HALVINGS):
            start = {name: Start(gamma * factors.P, factors.Q) for name, factors in step.items()}
            if self._loss(probe, start) < self.gradients.loss:
                if gamma < self.gamma:
                    probe.notes.append(f"gora began with a step of {gamma:g}: the loss rose at {2 * gamma:g}")
                return start
            gamma /= 2
        probe.notes.append("gora began at ΔW = 0: no step along the gradient made the loss fall")
        return {name: Start(torch.zeros_like(factors.P), factors.Q) for name, factors in step.items()}

    def _loss(self, probe: Probe, start: Mapping[str, Start]) -> float:
        def moved(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if name not in start:
                return y
            return y + low_rank(x, start[name].P, start[name].Q).to(y.dtype)

        with probe.hooked(moved):
            losses = [self._finite(probe, index) for index in range(len(probe.batches))]
        return sum(losses) / len(losses)

    @staticmethod
    def _finite(probe: Probe, index: int) -> float:
        loss = probe.forward(probe.batches[index])
        return loss.item() if torch.isfinite(loss).all() else float("inf")
