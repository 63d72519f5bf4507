"""The rules: scores from averages, the course of the budget, look-ahead, and what stays in memory.

One allocation of one run is numpy, as in the package: its own :class:`Demand` and filling are used, and a rule changes
what goes into them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rankalloc.budget import SHAPES, BudgetPlan, LayerShape, RankBudget
from rankalloc.methods.allocators.base import Demand, fill

Averages = dict[str, np.ndarray]
_OF_96 = 96
_NAMES = {exponent: name for name, exponent in SHAPES.items()}

AVERAGES = ("first-order", "gradient", "squared", "signed")
"""What is averaged over the steps: |λ ∂L/∂λ|, |∂L/∂λ|, (λ ∂L/∂λ)² and λ ∂L/∂λ."""


def _rest_of_layer(values: np.ndarray) -> np.ndarray:
    """Each triplet's own value and those of all that follow it in its layer: the first has the layer's sum."""
    return np.cumsum(values[:, ::-1], 1)[:, ::-1]


SCORES: dict[str, Callable[[np.ndarray, Averages], np.ndarray]] = {
    "weighted-energy": lambda size, of: size * of["first-order"],
    "energy": lambda size, of: size**2,
    "size": lambda size, of: size,
    "first-order": lambda size, of: of["first-order"],
    "gradient-norm": lambda size, of: of["gradient"],
    "squared first-order": lambda size, of: of["squared"],
    "signed first-order": lambda size, of: np.abs(of["signed"]),
    "layer's weighted energy": lambda size, of: _rest_of_layer(size * of["first-order"]),
    "layer's energy": lambda size, of: _rest_of_layer(size**2),
    "layer's first-order": lambda size, of: _rest_of_layer(of["first-order"]),
}
"""{name: score of (layers, R) from sizes and averages}. In canonical form sizes are singular values, and fall within a
layer."""


@dataclass(frozen=True)
class Rule:
    """How ranks are placed while a run trains. Steps are those of a run of 96.

    The defaults are the rule that the search began from: ``auto`` with a warm-up of a tenth and no look-ahead.

    Attributes:
        warmup: steps before the first cut.
        freeze: the step of the last cut.
        every: steps from one cut to the next.
        exponent: of the budget's course, (1 − progress)^exponent; 0 cuts everything at once.
        look_ahead: keep at every cut what the budget at the end would keep by the scores of today.
        score: a key of :data:`SCORES`.
        cost_exponent: layers are served by score / cost^this.
        spares: dropped triplets that stay in memory and may grow back, in multiples of the package's.
        cap: the most ranks of a layer; None for the peak rank.
        speed: {factor: multiple of the learning rate}.
        std: standard deviation of the first P and Q.
        rms: what the entries of P and Q are brought to after each cut, at the same update; None leaves them
            orthonormal.
        renew: draw new factors for the ranks that were found, when they freeze.
    """

    warmup: int = 10
    freeze: int = 58
    every: int = 4
    exponent: float = 3
    look_ahead: bool = False
    score: str = "weighted-energy"
    cost_exponent: float = 1.0
    spares: int = 1
    cap: int | None = None
    speed: dict[str, float] = field(default_factory=dict)
    std: float = 0.02
    rms: float | None = None
    renew: bool = False

    def plan(self, shapes: Sequence[LayerShape], rank: int, params: int, steps: int) -> BudgetPlan:
        """The budget of ``params`` parameters for layers that begin at ``rank``, in a run of ``steps``."""
        budget = RankBudget(
            params=params, max_rank=self.cap, warmup=self.warmup / _OF_96, freeze=1 - self.freeze / _OF_96,
            every=self.every, shape=_NAMES.get(self.exponent, "cubic"),
        )  # fmt: skip
        return budget.resolve([replace(shape, rank=rank) for shape in shapes], steps)

    def asked(self, plan: BudgetPlan, step: int) -> int:
        """The budget after ``step``: the plan's own, or its formula with an exponent that the package does not have."""
        if self.exponent in _NAMES or not plan.warmup_steps < step < plan.freeze_step:
            return plan.asked(step)
        progress = (step - plan.warmup_steps) / (plan.freeze_step - plan.warmup_steps)
        above = min(plan.initial, plan.ceiling) - plan.target
        return int(plan.target + above * (1 - progress) ** self.exponent + 1e-9)

    def choose(
        self, plan: BudgetPlan, step: int, held: np.ndarray, sizes: np.ndarray, averages: Averages
    ) -> tuple[np.ndarray, np.ndarray]:
        """(kept, what stays in memory), both (layers, R) bool, at the cut after ``step``.

        Args:
            held: (layers,), triplets in memory; the first ones of each row of ``sizes`` (layers, R) and of averages.
        """
        scores = [row[:own] for row, own in zip(SCORES[self.score](sizes, averages), held, strict=True)]
        demand = Demand.of(plan, self.asked(plan, step))
        last = step == plan.freeze_step
        if self.look_ahead and not last:
            at_the_end = self._filled(scores, replace(demand, amount=plan.target))
            demand = replace(demand, floors=tuple(int(mask.sum()) for mask in at_the_end))
        kept = np.zeros(sizes.shape, bool)
        for row, mask in zip(kept, self._filled(scores, demand), strict=True):
            row[: len(mask)] = mask
        if last:
            return kept, kept
        inside = np.arange(sizes.shape[1]) < held[:, None]
        empty = np.cumsum(inside & ~kept, 1)
        return kept, inside & (kept | (empty <= self._spares(plan)[:, None]))

    def _filled(self, scores: list[np.ndarray], demand: Demand) -> list[np.ndarray]:
        return fill(scores, demand, lambda blocks: blocks.score / blocks.cost**self.cost_exponent)

    def _spares(self, plan: BudgetPlan) -> np.ndarray:
        """Dropped triplets that stay, by layer: as many as may be needed to spend what no dearer rank fits into."""
        costs = np.asarray(plan.costs)
        if costs.min() == costs.max():
            return np.zeros(len(costs), int)
        return -(-costs.max() // costs) * self.spares
