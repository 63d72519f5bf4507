"""Learning rates: which are tried, and which one an arm is judged at."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


def mean_losses(tried: Iterable[tuple[float, float]], seeds: int) -> dict[float, float]:
    """{rate: mean tuning loss} from (rate, loss) pairs, of the rates with at least ``seeds`` pairs.

    A diverged run has an infinite loss, which makes the mean infinite.
    """
    found: dict[float, list[float]] = {}
    for rate, loss in tried:
        found.setdefault(rate, []).append(loss)
    return {rate: statistics.fmean(losses) for rate, losses in sorted(found.items()) if len(losses) >= seeds}


def best_rate(losses: Mapping[float, float]) -> float | None:
    """The rate with the lowest tuning loss, the lower one of equals; None when every run diverged."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: (finite[rate], rate), default=None)


@dataclass(frozen=True)
class Grid:
    """The rates an arm is tried at. The grid grows while its best rate is at an edge.

    Attributes:
        first: the rates to begin with, in ascending order.
        factor: the step by which the grid grows.
        extensions: how many times it may grow; a best rate that is still at an edge then stays there.
        digits: significant digits of a rate; rates are keys, so they are rounded.
    """

    first: tuple[float, ...]
    factor: float = 2.0
    extensions: int = 3
    digits: int = 6

    @classmethod
    def fixed(cls, rates: Sequence[float]) -> Grid:
        """Exactly ``rates``."""
        return cls(tuple(sorted(rates)), extensions=0)

    def wanted(self, losses: Mapping[float, float]) -> list[float]:
        """The rates to try next; empty once the best rate is settled.

        Args:
            losses: tuning loss of each rate that has been tried, infinite where training diverged.
        """
        if missing := [rate for rate in self.first if rate not in losses]:
            return missing
        steps = self._steps()
        coarse = {rate: loss for rate, loss in losses.items() if rate in steps}
        best = min(coarse, key=lambda rate: (coarse[rate], rate))  # the lowest rate when all diverged
        if len(coarse) < len(self.first) + self.extensions:
            if best == min(coarse):
                return [self._rounded(best / self.factor)]
            if best == max(coarse):
                return [self._rounded(best * self.factor)]
        return []

    def _steps(self) -> set[float]:
        """Every rate of the coarse grid: those to begin with, and those it may grow to."""
        steps = list(self.first)
        for _ in range(self.extensions):
            steps = [self._rounded(steps[0] / self.factor), *steps, self._rounded(steps[-1] * self.factor)]
        return set(steps)

    def _rounded(self, rate: float) -> float:
        return float(f"{rate:.{self.digits}g}")
