"""The runs of an audit, and which of them are to be made next.

A run is a cell: an arm, and either a rate that it is tuned at or a seed that it is compared on. What is next follows
from the results so far alone, so that any number of workers, started and stopped at will, makes the same runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...audit_record import TriedRate
from ..config import RunConfig
from .arms import Arm, Setting, first_rate
from .tuning import best_of, next_rates

Phase = Literal["tune", "seed"]
_A_PHASE, _AN_ARM = 50, 100


@dataclass(frozen=True, order=True)
class Cell:
    """One run: the ``index``-th rate, or the ``index``-th seed, of the arm in this place of the list."""

    arm: int
    phase: Phase
    index: int

    @property
    def slot(self) -> int:
        """Its number in the study."""
        return self.arm * _AN_ARM + (_A_PHASE if self.phase == "seed" else 0) + self.index

    @classmethod
    def of_slot(cls, slot: int) -> Cell:
        """The cell of a number."""
        arm, rest = divmod(slot, _AN_ARM)
        return cls(arm, "seed" if rest >= _A_PHASE else "tune", rest % _A_PHASE)


FOLDER = "folder"
"""The attribute of a trial that names the folder of its run, in that of its arm."""


def seed_of(config: RunConfig, cell: Cell) -> int:
    """The seed of a cell's run: the configuration's own for tuning, and the ones after it for the comparison."""
    return (config.seed + (0 if cell.phase == "tune" else 1 + cell.index)) % 2**32


def folder_of(config: RunConfig, cell: Cell) -> str:
    """The name of the folder of a cell's run: by its seed, or by the place of its rate."""
    return f"{cell.phase}-{cell.index if cell.phase == 'tune' else seed_of(config, cell)}"


def folder_before(cell: Cell) -> str:
    """The name that the folder had in audits that were begun before folders had the name of their seed."""
    return f"{cell.phase}-{cell.index}"


@dataclass(frozen=True)
class Result:
    """What came out of a run: attributes of its trial, or the message of its failure."""

    attrs: Mapping[str, Any]
    message: str | None = None

    @property
    def value(self) -> float | None:
        """The metric by which it is judged: on the tune split while tuning, else on the report split."""
        return self.attrs.get("value") if self.message is None else None


Results = Mapping[Cell, Result]


def tried(results: Results, arm: int) -> list[TriedRate]:
    """The rates of an arm that have a result, in the order in which they were tried, without gaps."""
    found: list[TriedRate] = []
    while (cell := Cell(arm, "tune", len(found))) in results:
        one = results[cell]
        found.append(TriedRate(rate=one.attrs["rate"], value=one.value, message=one.message))
    return found


def chosen_rate(results: Results, arm: int, setting: Setting) -> float | None:
    """The rate that an arm is compared at, once it is tuned; None before, and when training failed at every rate."""
    have, trials = tried(results, arm), setting.config.audit.trials
    if len(have) < trials or all(one.value is None for one in have):
        return None
    return best_of(have, setting.prepared.direction == "maximize").rate


def failed(results: Results, arm: int, setting: Setting) -> str | None:
    """Why an arm cannot be compared: it failed at every rate; None where it can, or may yet."""
    have = tried(results, arm)
    if len(have) < setting.config.audit.trials or any(one.value is not None for one in have):
        return None
    return f"training failed at every rate: {have[-1].message}"


def wanted(arms: Sequence[Arm], results: Results, setting: Setting, seeds: int) -> dict[Cell, float]:
    """{cell: its rate} of all runs that can be made by now, those that have a result included, to tune every arm and to
    compare it on the first ``seeds`` seeds."""
    maximize, audit = setting.prepared.direction == "maximize", setting.config.audit
    found: dict[Cell, float] = {}
    for place, arm in enumerate(arms):
        if arm.skipped is not None:
            continue
        have = tried(results, place)
        found |= {Cell(place, "tune", index): one.rate for index, one in enumerate(have)}
        further = next_rates(have, first_rate(setting, arm), audit.spread, audit.trials, maximize)
        found |= {Cell(place, "tune", len(have) + index): rate for index, rate in enumerate(further)}
        rate = chosen_rate(results, place, setting)
        if rate is not None:
            found |= {Cell(place, "seed", index): rate for index in range(seeds)}
    return found


def complete(arms: Sequence[Arm], results: Results, setting: Setting, seeds: int) -> bool:
    """Whether every arm has been tuned and compared on the first ``seeds`` seeds."""
    for place, arm in enumerate(arms):
        if arm.skipped is not None or failed(results, place, setting) is not None:
            continue
        if chosen_rate(results, place, setting) is None:
            return False
        if any(Cell(place, "seed", index) not in results for index in range(seeds)):
            return False
    return True
