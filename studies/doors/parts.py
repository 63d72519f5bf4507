"""The three parts: where the arms meet, the rates each is tried at, how many seeds, and what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.grid import Grid, best_rate, mean_losses
from . import language, planted, punctuation
from .arms import ARMS, CHOOSING, EQUAL
from .cells import Cell

TINY = 1e-30  # an error of zero has no logarithm


@dataclass(frozen=True)
class Part:
    """One question, asked of several arms.

    Attributes:
        rate_seeds: seeds that choose a rate, from 0.
        seeds: other seeds that are compared, from ``first_seed``.
        run: one run's record from its cell.
        value: a record's measure, of which the mean over seeds is taken; lower is better.
    """

    name: str
    arms: tuple[str, ...]
    places: tuple[str, ...]
    grid: Grid
    steps: int
    rate_seeds: int
    seeds: int
    first_seed: int
    run: Callable[[Cell], dict[str, Any]]
    value: Callable[[dict[str, Any]], float]

    def tuned(self, runs: Sequence[dict], place: str, arm: str) -> dict[float, float]:
        """{rate: mean value} of the rates at which all seeds of phase "rates" have finished."""
        mine = [run for run in runs if (run["phase"], run["place"], run["arm"]) == ("rates", place, arm)]
        return mean_losses(((run["rate"], value_of(self, run)) for run in mine), self.rate_seeds)

    def wanted(self, runs: Sequence[dict]) -> Iterator[Cell]:
        """What is to be run, as far as it is known by now: the seeds of an arm wait for its rate."""
        waiting: list[Cell] = []
        for place in self.places:
            for arm in self.arms:
                tuned = self.tuned(runs, place, arm)
                for rate in self.grid.wanted(tuned):
                    yield from (self._cell("rates", place, arm, rate, seed) for seed in range(self.rate_seeds))
                rate = best_rate(tuned)
                if not self.grid.wanted(tuned) and rate is not None:
                    seeds = range(self.first_seed, self.first_seed + self.seeds)
                    waiting += (self._cell("seeds", place, arm, rate, seed) for seed in seeds)
        yield from sorted(waiting, key=lambda cell: cell.seed)  # stopped early, all arms have equally many

    def _cell(self, phase: str, place: str, arm: str, rate: float, seed: int) -> Cell:
        return Cell(self.name, phase, place, arm, rate, self.steps, seed)


def value_of(part: Part, run: dict[str, Any]) -> float:
    """A run's measure; infinite where it diverged."""
    return math.inf if "message" in run else part.value(run)


def log_error(run: dict[str, Any]) -> float:
    """log10 of the student's relative error, so that means are geometric."""
    return math.log10(max(TINY, run["relative_error"]))


PARTS = {part.name: part for part in (
    Part("planted", CHOOSING, planted.PLACES, Grid((5e-3, 1e-2, 2e-2), refine=True), planted.training.STEPS,
         rate_seeds=1, seeds=5, first_seed=0, run=planted.run, value=log_error),
    Part("language", ARMS, ("language",), Grid((1e-3, 3e-3, 1e-2, 1.4e-2, 2e-2), factor=1.5), 240,
         rate_seeds=2, seeds=5, first_seed=100, run=language.run, value=lambda run: run["loss"]),
    Part("punctuation", (*CHOOSING, EQUAL), ("punctuation",), Grid((4e-3, 8e-3, 1.6e-2), refine=True), 128,
         rate_seeds=1, seeds=6, first_seed=100, run=punctuation.run, value=lambda run: run["loss"]),
)}  # fmt: skip
"""{name: part}."""
