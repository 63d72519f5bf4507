"""How far an audit is, by its results alone: for a dry run, and for a record that is not final."""

from __future__ import annotations

import shlex
import statistics
from dataclasses import dataclass

from .arms import Arm
from .cells import Cell, Results, failed
from .concluding import is_over, looks_of, seeds_by_now
from .running import Audit


@dataclass(frozen=True)
class Progress:
    """An audit at the moment: how many runs have ended, and with a failure; how many are left at least and at most;
    and how long one takes, in seconds (None: nothing to go by)."""

    done: int
    failed: int
    least: int
    most: int
    each: float | None

    @property
    def seconds_left(self) -> tuple[float, float] | None:
        """The time that is left, over all processes, at least and at most."""
        return None if self.each is None else (self.least * self.each, self.most * self.each)


def progress_of(audit: Audit, results: Results) -> Progress:
    """How far an audit with these results is."""
    took = [float(one.attrs["seconds"]) for one in results.values() if "seconds" in one.attrs]
    seeds, last = seeds_by_now(audit, results), looks_of(audit.config)[-1]
    least = _left(audit, results, seeds)
    over = least == 0 and is_over(audit, results, seeds)
    return Progress(
        done=len(results), failed=sum(one.message is not None for one in results.values()), least=least,
        most=0 if over else _left(audit, results, last), each=statistics.fmean(took) if took else None,
    )


def most_runs(audit: Audit) -> int:
    """How many runs the audit makes if it goes on to its last look."""
    return len(running_arms(audit)) * (audit.config.audit.trials + looks_of(audit.config)[-1])


def running_arms(audit: Audit) -> list[Arm]:
    """The arms that apply."""
    return [arm for arm in audit.arms if arm.skipped is None]


def arm_text(audit: Audit, results: Results, arm: Arm) -> str:
    """What has been made of an arm, in words."""
    place = list(audit.arms).index(arm)
    rates, seeds = (sum(cell.arm == place and cell.phase == phase for cell in results) for phase in ("tune", "seed"))
    return f"{rates} of {audit.config.audit.trials} rates tried, {seeds} {'seed' if seeds == 1 else 'seeds'} run"


def _left(audit: Audit, results: Results, seeds: int) -> int:
    """Runs that are missing until every arm is tuned and compared on so many seeds."""
    trials, left = audit.config.audit.trials, 0
    for place, arm in enumerate(audit.arms):
        if arm.skipped is None and failed(results, place, audit.setting) is None:
            cells = [Cell(place, "tune", n) for n in range(trials)] + [Cell(place, "seed", n) for n in range(seeds)]
            left += sum(cell not in results for cell in cells)
    return left


def unfinished(audit: Audit, results: Results) -> str:
    """The sentence that marks a record as one of an audit that is not over, and says how to go on."""
    folder, far = audit.folder, progress_of(audit, results)
    again = shlex.join(["rankalloc", "audit", str(folder.config), "--output", str(folder.path)])
    way_out = again if audit.storage == folder.study.name else "the command that began it"
    return f"the audit is not finished: {far.done} of at most {most_runs(audit)} runs are made; go on with: {way_out}"
