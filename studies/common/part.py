"""A part of a study: the arms that are compared, the rates each is tried at, and the runs that are still wanted."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rankalloc.errors import RankallocError

from .grid import Grid, best_rate, mean_losses

SPLITS = {"rates": "tune", "seeds": "report"}
"""The split on which a run of each phase is judged."""


class Cell(NamedTuple):
    """What identifies a run: two runs of one cell are the same run.

    Attributes:
        part: a name of the study's parts.
        phase: "rates" for runs that choose a rate, "seeds" for those that are compared.
        place: where the arms meet, a problem or a budget; the part's name where there is only one.
    """

    part: str
    phase: str
    place: str
    arm: str
    rate: float
    steps: int
    seed: int


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

    def missing(self, runs: Sequence[dict]) -> list[Cell]:
        """The wanted cells that have not been run."""
        mine = self.own(runs)
        done = {tuple(run[name] for name in Cell._fields) for run in mine}
        return [cell for cell in self.wanted(mine) if cell not in done]

    def own(self, runs: Sequence[dict]) -> list[dict]:
        """The runs that belong to this part and have its number of steps."""
        return [run for run in runs if (run["part"], run["steps"]) == (self.name, self.steps)]


def recorded(run: Callable[[Cell], dict[str, Any]], cell: Cell) -> dict[str, Any]:
    """A run's record, on one thread. One that diverges has a "message" and nothing measured."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        found = run(cell)
    except RankallocError as error:
        if type(error) is not RankallocError:  # a mistake in the settings, not an outcome
            raise
        found = {"message": str(error)}
    return {**cell._asdict(), **found, "seconds": round(time.perf_counter() - started, 2)}


def value_of(part: Part, run: dict[str, Any]) -> float:
    """A run's measure; infinite where it diverged."""
    return math.inf if "message" in run else part.value(run)


def loss(run: dict[str, Any]) -> float:
    """The loss in nats."""
    return float(run["loss"])
