"""The two budgets: the arms that meet at each, and the rates they are tried at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..common.grid import Grid
from ..common.part import Cell, Part, loss
from .arms import ATTACH, DRIVEN, EVERY_OTHER, LOWER, UNIFORM, UPPER
from .training import run

STEPS = 64


@dataclass(frozen=True)
class Budget(Part):
    """A part in which tuning also takes one of several patterns of equal ranks; that one alone is judged.

    Attributes:
        patterns: the arms of equal ranks.
    """

    patterns: tuple[str, ...]

    def uniform(self, runs: Sequence[dict]) -> str | None:
        """The pattern with the lowest tuning loss; None until all have their rates."""
        losses = {arm: self.tuned(runs, arm).get(self.chosen_rate(runs, arm), math.inf) for arm in self.patterns}
        settled = all(self.chosen_rate(runs, arm) is not None for arm in self.patterns)
        return min(losses, key=lambda arm: (losses[arm], arm)) if settled else None

    def wanted(self, runs: Sequence[dict]) -> Iterator[Cell]:
        """What is to be run, as far as it is known by now."""
        for cell in super().wanted(runs):
            if cell.phase == "rates" or cell.arm not in self.patterns or cell.arm == self.uniform(runs):
                yield cell

    def compared(self, runs: Sequence[dict]) -> tuple[str, ...]:
        """The arms that are judged: those that choose ranks, and the tuned uniform one."""
        return tuple(arm for arm in self.arms if arm not in self.patterns or arm == self.uniform(runs))


def _budget(name: str, patterns: tuple[str, ...], rates: tuple[float, ...]) -> Budget:
    return Budget(
        name, (*patterns, DRIVEN, ATTACH), (name,), Grid(rates, extensions=2), STEPS, rate_seeds=1, seeds=5,
        first_seed=100, run=run, value=loss, criterion=loss, patterns=patterns,
    )  # fmt: skip


PARTS = {part.name: part for part in (
    _budget("half", (EVERY_OTHER, UPPER, LOWER), (4e-3, 8e-3)),
    _budget("two", (UNIFORM,), (4e-3, 8e-3)),
)}  # fmt: skip
"""{budget: its part}."""
