"""Module types: ranks by the type of a layer, in proportion to weights you say.

Types are bought whole, in the order weight / (position + 1): the highest averages (D'Hondt), so ranks are in
proportion to weights and all layers of a type have one rank. Types without a weight weigh 1, and without any
weights this is uniform LoRA, to the last remainder.

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
        weights: {suffix or regular expression: weight}; 1 where none is said.
    """

    name = "module-types"

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weights = {} if weights is None else weights

    def scores(self, probe: Probe, choose: Choose) -> Scores:
        named = matched("weights", self.weights, list(probe.targets))
        named = {name: number(f"the weight of {name}", weight) for name, weight in named.items()}
        return {name: named.get(name, 1.0) / (np.arange(peak) + 1.0) for name, peak in probe.peaks.items()}
