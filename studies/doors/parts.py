"""The three parts: where the arms meet, the rates each is tried at, how many seeds, and what is measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.grid import Grid, best_rate, mean_losses
from . import language, planted, punctuation
from .arms import ARMS, CHOOSING, EQUAL
from .cells import Cell

TINY = 1e-30  # an error of zero has no logarithm
WRONG = 100.0  # decades of error that all ranks being wrong amounts to


@dataclass(frozen=True)
class Part:
    """One question, asked of several arms. Each arm has one rate in all places.

    Attributes:
        rate_seeds: seeds that choose a rate, from 0.
        seeds: other seeds that are compared, from ``first_seed``.
        run: one run's record from its cell.
        value: a record's measure, of which the mean over seeds is taken; lower is better.
        criterion: what a rate is chosen by, over seeds and places; lower is better.
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
    criterion: Callable[[dict[str, Any]], float]

    def tuned(self, runs: Sequence[dict], arm: str) -> dict[float, float]:
        """{rate: mean criterion} of the rates at which phase "rates" has finished in all places. A grid that does not
        grow leaves out all rates but its own."""
        mine = [run for run in runs if (run["phase"], run["arm"]) == ("rates", arm)]
        if not self.grid.extensions:
            mine = [run for run in mine if run["rate"] in self.grid.first]
        tried = ((run["rate"], math.inf if "message" in run else self.criterion(run)) for run in mine)
        return mean_losses(tried, self.rate_seeds * len(self.places))

    def chosen_rate(self, runs: Sequence[dict], arm: str) -> float | None:
        """The rate an arm is judged at; None until one is settled."""
        tuned = self.tuned(runs, arm)
        return None if self.grid.wanted(tuned) else best_rate(tuned)

    def wanted(self, runs: Sequence[dict]) -> Iterator[Cell]:
        """What is to be run, as far as it is known by now: the seeds of an arm wait for its rate."""
        settled = {arm: self.chosen_rate(runs, arm) for arm in self.arms}
        for arm in self.arms:
            for rate in self.grid.wanted(self.tuned(runs, arm)):
                for seed, place in itertools.product(range(self.rate_seeds), self.places):
                    yield self._cell("rates", place, arm, rate, seed)
        # seed by seed: stopped early, all arms have equally many
        for seed, place in itertools.product(range(self.first_seed, self.first_seed + self.seeds), self.places):
            for arm, chosen in settled.items():
                if chosen is not None:
                    yield self._cell("seeds", place, arm, chosen, seed)

    def _cell(self, phase: str, place: str, arm: str, rate: float, seed: int) -> Cell:
        return Cell(self.name, phase, place, arm, rate, self.steps, seed)


def value_of(part: Part, run: dict[str, Any]) -> float:
    """A run's measure; infinite where it diverged."""
    return math.inf if "message" in run else part.value(run)


def log_error(run: dict[str, Any]) -> float:
    """log10 of the student's relative error, so that means are geometric."""
    return math.log10(max(TINY, run["relative_error"]))


def ranks_then_error(run: dict[str, Any]) -> float:
    """The error, and far above it the layers with a wrong rank where there is a right one.

    A low rate can have the lowest error on one network and miss ranks on the other (studies/planted).
    """
    wrong = 0.0 if run["place"].startswith("half") else 1.0 - run["exact"]
    return log_error(run) + WRONG * wrong


def loss(run: dict[str, Any]) -> float:
    """The loss in nats."""
    return float(run["loss"])


PARTS = {part.name: part for part in (
    Part("planted", CHOOSING, planted.PLACES, Grid((5e-3, 1e-2, 2e-2)), planted.training.STEPS, rate_seeds=3, seeds=5,
         first_seed=0, run=planted.run, value=log_error, criterion=ranks_then_error),
    Part("language", ARMS, ("language",), Grid((1e-3, 3e-3, 1e-2, 1.4e-2, 2e-2), factor=1.5), 240, rate_seeds=2,
         seeds=5, first_seed=100, run=language.run, value=loss, criterion=loss),
    Part("punctuation", (*CHOOSING, EQUAL), ("punctuation",), Grid((4e-3, 8e-3, 1.6e-2)), 96, rate_seeds=1, seeds=6,
         first_seed=100, run=punctuation.run, value=loss, criterion=loss),
)}  # fmt: skip
"""{name: part}."""
