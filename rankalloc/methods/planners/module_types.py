"""Module types: ranks by the type of a layer, proportional to the weights you give.

Ranks are bought for all layers of a type at once, in the order of weight / (position + 1): highest averages (D'Hondt),
so ranks are proportional to weights and all layers of a type have the same rank. A type without a weight weighs 1;
without any weights the result is uniform LoRA, to the last remainder.

Cost: none. Known weakness: types are few, and which of them matters depends on the task.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...options import number
from .base import Choose, NoData, Scores
from .patterns import matched
from .probe import Probe


class ModuleTypes(NoData):
    """Scores from the names of layers; see the module docstring.

    Args:
        weights: {suffix or regular expression: weight}; 1 for the others.
    """

    name = "module-types"

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weights = {} if weights is None else weights

    def scores(self, probe: Probe, choose: Choose) -> Scores:
        named = matched("weights", self.weights, list(probe.targets))
        named = {name: number(f"the weight of {name}", weight) for name, weight in named.items()}
        return {name: named.get(name, 1.0) / (np.arange(peak) + 1.0) for name, peak in probe.peaks.items()}
