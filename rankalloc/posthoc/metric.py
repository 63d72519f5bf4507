"""The metric that weighs an update: ‖G^½ ΔW C^½‖_F, with C the second moment of a layer's inputs and G that of the
gradients at its outputs.

To second order, and with inputs and gradients taken as independent (K-FAC: Martens and Grosse, 2015, arXiv
1503.05671), the square of this norm is ΔWᵀ F ΔW with the Fisher information F: the change of the loss when ΔW is
dropped. With G = 1 it is the mean squared change of the layer's output.

A metric gives PᵀGP and QCQᵀ, (r, r) each, for given factors; :mod:`rankalloc.lowrank` shows why no more is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError
from ..files import sha256_of
from ..lowrank import Factors
from ..storage.tensors import encode


@dataclass
class KroneckerMetric:
    """Second moments that the user provides: of inputs, C = E[xxᵀ], and of output gradients, G = E[ggᵀ].

    Args:
        inputs: {layer: C (d_in, d_in), or its diagonal (d_in,)}; C = 1 for layers that are missing.
        outputs: {layer: G (d_out, d_out), or its diagonal (d_out,)}; G = 1 for layers that are missing.
        damping: this share of a moment's mean diagonal is added to its diagonal.

    Raises:
        ConfigError: a moment does not fit its layer.
    """

    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    damping: float = 0.01

    def __str__(self) -> str:
        return "inputs and output gradients" if self.outputs else "inputs"

    def fingerprint(self) -> str:
        """A hash over all moments."""
        sides = (("C", self.inputs), ("G", self.outputs))
        tensors = {f"{side}.{name}": value for side, moments in sides for name, value in moments.items()}
        return sha256_of(encode(tensors, {"damping": repr(self.damping)}))

    def grams(self, name: str, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """(PᵀGP, QCQᵀ), (r, r) each in float64."""
        return (
            self._gram(name, factors.P.T, self.outputs.get(name)), self._gram(name, factors.Q, self.inputs.get(name))
        )

    def _gram(self, name: str, rows: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
        rows = rows.detach().cpu().double()
        if moment is None:
            return rows @ rows.T
        moment = moment.detach().cpu().double()
        width = rows.shape[1]
        if moment.shape not in ((width,), (width, width)):
            raise ConfigError(
                f"the moment of {name} has the shape {tuple(moment.shape)}, but its layer is {width} wide; give "
                f"({width}, {width}) or the diagonal ({width},)"
            )
        diagonal = moment if moment.dim() == 1 else moment.diagonal()
        weighted = rows * moment if moment.dim() == 1 else rows @ moment
        return weighted @ rows.T + self.damping * diagonal.mean() * (rows @ rows.T)
