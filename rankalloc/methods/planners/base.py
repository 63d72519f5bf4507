"""The interface of planners, which look at a model and some batches before training and score ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from ...adapters.plan import Start
from ...budget import LayerShape
from ...options import integer
from .probe import Probe

Scores = dict[str, np.ndarray]
Choose = Callable[[Scores], dict[str, int]]


class Planner(ABC):
    """Chooses ranks before training, by scores that an allocator turns into ranks.

    A new planner is one file with a subclass and one line in ``rankalloc.methods.planners.PLANNERS``. It looks at the
    model through a :class:`~rankalloc.methods.planners.probe.Probe`, inside
    :func:`~rankalloc.methods.planners.probe.unchanged`, which restores the model.

    Args:
        max_batches: how many batches to look at, at most.
        options: keywords of the subclass.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool] = True
    """Whether it looks at batches."""

    def __init__(self, max_batches: int = 8) -> None:
        self.max_batches = integer("max_batches", max_batches, 1)

    @abstractmethod
    def scores(self, probe: Probe, choose: Choose) -> Scores:
        """{name: (peak rank,)}: the score of each rank of each layer; the highest are kept.

        ``choose`` returns the ranks {name: rank} that given scores would lead to, for planners that stop looking
        depending on them.
        """

    def initial(self, probe: Probe, ranks: Mapping[str, int]) -> dict[str, Start]:
        """{name: the factors its adapter starts with} at its final rank; {} leaves the initialisation alone.

        Called after :meth:`scores`, with the same probe."""
        return {}

    def given(self, shapes: Sequence[LayerShape]) -> dict[str, int] | None:
        """The ranks, for a planner that is given them; None when an allocator finds them."""
        return None


class NoData(Planner):
    """A planner that looks at layer names only."""

    needs_data = False

    def __init__(self) -> None:
        super().__init__()


def constant(probe: Probe, weights: Mapping[str, float]) -> Scores:
    """One weight per layer as scores, for the proportional allocator."""
    return {name: np.full(probe.peaks[name], float(weights[name])) for name in probe.targets}
