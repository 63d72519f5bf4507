"""Manual: the ranks you give, {suffix or regular expression: rank}, as PEFT's ``rank_pattern``.

A layer that no key matches has the peak rank. Cost: none. Known weakness: it is only as good as the guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...budget import LayerShape
from ...errors import ConfigError
from ...options import integer
from .base import Choose, NoData, Scores
from .patterns import matched
from .probe import Probe


class Manual(NoData):
    """Ranks by name; see the module docstring.

    Args:
        rank_pattern: {suffix or regular expression: rank}.
    """

    name = "manual"

    def __init__(self, rank_pattern: Mapping[str, int] | None = None) -> None:
        super().__init__()
        if rank_pattern is None:
            raise ConfigError(
                "method 'manual' needs the ranks: rank_pattern={suffix or regular expression: rank}, as PEFT's"
            )
        self.rank_pattern = rank_pattern

    def given(self, shapes: Sequence[LayerShape]) -> dict[str, int]:
        named = matched("rank_pattern", self.rank_pattern, [shape.name for shape in shapes])
        ranks = {shape.name: named.get(shape.name, shape.rank) for shape in shapes}
        for shape in shapes:
            what = f"the rank of {shape.name} in rank_pattern, at most the smaller side of its weight,"
            ranks[shape.name] = integer(what, ranks[shape.name], 0, min(shape.d_in, shape.d_out))
        return ranks

    def scores(self, probe: Probe, choose: Choose) -> Scores:
        return {name: np.zeros(peak) for name, peak in probe.peaks.items()}
