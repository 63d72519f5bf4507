"""FIM: ranks ∝ the empirical Fisher information of LoRA's P, E[(∂L/∂P)²] averaged over its entries.

At P = 0 the gradient of P is that of the full weight projected by the random Q, ∂L/∂P = ∂L/∂W Qᵀ (FIM-LoRA, arXiv
2605.16800, which calls them B and A); it is squared for each of a few batches and averaged.

Cost: one forward and backward pass per batch, peak rank × (d_in + d_out) numbers per layer. Known weakness: the
gradient of a whole batch underrates the information of single examples, and its author found it no better than LoRA.
"""

from __future__ import annotations

import torch

from ...errors import RankallocError
from .base import Choose, Planner, Scores, constant
from .probe import Probe, low_rank


class FIM(Planner):
    """One score per layer, the mean diagonal Fisher information of its P; see the module docstring."""

    name = "fisher"

    def scores(self, probe: Probe, choose: Choose) -> Scores:
        Q = {name: probe.kaiming(name, max(1, probe.peaks[name])) for name in probe.targets}
        P = {name: q.new_zeros(probe.shape(name)[1], len(q), requires_grad=True) for name, q in Q.items()}
        information = dict.fromkeys(probe.targets, 0.0)
        with probe.hooked(lambda name, x, y: y + low_rank(x, P[name], Q[name]).to(y.dtype)):
            for index in range(len(probe.batches)):
                probe.backward(probe.loss(index), index)
                for name, factor in P.items():
                    if factor.grad is None:
                        continue
                    if not torch.isfinite(factor.grad).all():
                        raise RankallocError(
                            f"the gradient of {name} on batch {index} is not finite: ranks cannot be planned from it; "
                            "check the batch, or load the model in a wider dtype than float16"
                        )
                    information[name] += factor.grad.square().mean().item() / len(probe.batches)
                    factor.grad = None
        return constant(probe, information)
