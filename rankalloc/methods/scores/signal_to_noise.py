"""Signal to noise: smoothed sensitivity divided by its uncertainty.

AdaLoRA multiplies the two, which ranks a noisy entry high; IGU-LoRA (arXiv 2603.13792) divides them. The
averages and the sum over a triplet are AdaLoRA's (:mod:`rankalloc.methods.scores.sensitivity`):
s(w) = Ī / (Ū + ε). The paper also integrates the gradient along the path from ΔW = 0, which takes extra
passes and is left out here.

State: 2 × the adapter. Known weakness: a triplet that is steadily unimportant has a high ratio too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .sensitivity import Sensitivity

EPSILON = 1e-12


class SignalToNoise(Sensitivity):
    """Sensitivity / uncertainty; see the module docstring."""

    name = "signal-to-noise"

    def of_entries(self) -> Sequence[torch.Tensor]:
        noise = torch._foreach_add(self.uncertainty, EPSILON)
        return torch._foreach_div(self.sensitivity, noise)
