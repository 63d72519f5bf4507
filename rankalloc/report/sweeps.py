"""From a sweep to rows: its trials, the front, the importances, one slice a parameter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..trace import RankChoice, SweepRecord, TrialRecord


@dataclass(frozen=True)
class TrialRow:
    """One row of the trials' table. ``choice`` decides the shape and colour the trial is drawn with; ``fresh`` is the
    mean over seeds that the trial was not chosen by, ``over`` names the limits it exceeds."""

    number: int
    role: str
    method: str
    choice: RankChoice
    params: str
    value: float | None
    ranks: int | None
    adapter_params: int | None
    seconds: float | None
    state: str
    best: bool
    front: bool
    message: str
    fresh: float | None = None
    over: tuple[str, ...] = ()


@dataclass(frozen=True)
class FrontPoint:
    """A completed trial in the figure of size (adapter parameters) against value."""

    number: int
    size: int
    value: float
    choice: RankChoice
    best: bool
    front: bool


@dataclass(frozen=True)
class SlicePoint:
    """One trial's value at ``x``, a number, a string or a truth value."""

    x: Any
    value: float
    choice: RankChoice
    number: int


@dataclass(frozen=True)
class Slice:
    """Value against one parameter. ``numeric`` decides how x is drawn; ``log`` is set when x spans 8× or more."""

    name: str
    numeric: bool
    log: bool
    points: list[SlicePoint]


def trial_rows(sweep: SweepRecord) -> list[TrialRow]:
    rows = []
    for trial in sweep.trials:
        choice = sweep.rank_choice(trial)
        shown = {k: v for k, v in trial.params.items() if k != "method"}
        rows.append(
            TrialRow(
                number=trial.number,
                role=trial.role,
                method=str(trial.params.get("method") or ("uniform" if choice == "uniform" else "")),
                choice=choice,
                params=", ".join(f"{k}\u00a0=\u00a0{_short(v)}" for k, v in shown.items()),
                value=trial.value,
                ranks=trial.ranks,
                adapter_params=trial.adapter_params,
                seconds=trial.seconds,
                state=trial.state,
                best=trial.number == sweep.best,
                front=trial.number in sweep.front,
                message=trial.message or "",
                fresh=fmean(trial.fresh) if trial.fresh else None,
                over=tuple(trial.over),
            )
        )
    return rows


def front_points(rows: list[TrialRow]) -> list[FrontPoint]:
    """Completed trials with a size and a value, by size."""
    points = [
        FrontPoint(row.number, row.adapter_params, row.value, row.choice, row.best, row.front)
        for row in rows
        if row.value is not None and row.adapter_params is not None and row.state == "complete"
    ]
    return sorted(points, key=lambda point: (point.size, point.number))


def importances(sweep: SweepRecord) -> list[tuple[str, float]]:
    """Parameters by importance, most important first; ties by name."""
    return sorted(sweep.importances.items(), key=lambda pair: (-pair[1], pair[0]))


def slices(sweep: SweepRecord) -> list[Slice]:
    """One slice for each parameter that took more than one value in completed trials."""
    names = list(dict.fromkeys(name for trial in sweep.trials for name in trial.params))
    made = []
    for name in names:
        points = [
            SlicePoint(t.params[name], t.value, sweep.rank_choice(t), t.number)
            for t in sweep.trials
            if name in t.params and t.value is not None and t.state == "complete"
        ]
        if len({repr(p.x) for p in points}) < 2:
            continue
        numeric = all(isinstance(p.x, (int, float)) and not isinstance(p.x, bool) for p in points)
        log = numeric and min(p.x for p in points) > 0 and max(p.x for p in points) >= 8 * min(p.x for p in points)
        made.append(Slice(name, numeric, log, points))
    return made


def to_come(sweep: SweepRecord) -> int:
    """How many trials are still to be made: those that are queued or under way, and what is left of the number that the
    command or the configuration asks for."""
    begun = sum(trial.state in ("running", "waiting") for trial in sweep.trials)
    told = re.search(r"--trials[ =](\d+)", sweep.command or "")
    plan = sweep.config.get("sweep")
    wanted = int(told[1]) if told else plan.get("trials") if isinstance(plan, dict) else None
    return max(begun, wanted - len(sweep.trials) + begun) if isinstance(wanted, int) else begun


def control_of(sweep: SweepRecord) -> TrialRecord | None:
    """The uniform trial that the best one is compared with: the pair's, else the best completed one."""
    if sweep.pair is not None:
        return next((t for t in sweep.trials if t.number == sweep.pair.uniform), None)
    sign = -1 if sweep.direction == "maximize" else 1
    done = [
        (sign * t.value, t.number, t)
        for t in sweep.trials
        if sweep.rank_choice(t) == "uniform" and t.state == "complete" and t.value is not None
    ]
    return min(done, key=lambda entry: entry[:2])[2] if done else None


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
