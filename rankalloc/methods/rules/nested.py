"""What rules share whose adapters can be cut from the end: :mod:`.dylora` and :mod:`.matryoshka`.

All ranks are there until the freeze. Then each layer is cut to a rank of its own that meets the budget, from the end:
‖P_i‖‖Q_i‖, made falling along the triplets, says where. A budget of everything (fraction=1) cuts nothing. Every rank
below stays usable, by :func:`rankalloc.at_rank` and :mod:`rankalloc.posthoc.nested_cut`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import Arrays, Rule


class Nested(Rule):
    """Cut once, from the end; a subclass says how the first triplets are trained, and at which scale they are used."""

    changes_forward = True
    nested = True

    def asked(self, step: int) -> int:
        return self.plan.target if step >= self.plan.freeze_step else self.plan.initial

    def allocates(self, step: int) -> bool:
        return step == self.plan.freeze_step

    def preferences(self, values: Arrays, live: Sequence[np.ndarray], step: int) -> Arrays:
        return [np.minimum.accumulate(v) if len(v) else v for v in values]
