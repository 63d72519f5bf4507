"""From a sweep to rows: its trials, the front, the importances, one slice a parameter."""

from __future__ import annotations

from dataclasses import dataclass

from rankalloc.trace import SweepRecord, TrialRecord


@dataclass(frozen=True)
class TrialRow:
    """One row of the trials' table. ``uniform`` tells the shape and colour it is drawn with."""

    number: int
    role: str
    method: str
    uniform: bool
    params: str
    value: float | None
    ranks: int | None
    adapter_params: int | None
    seconds: float | None
    state: str
    best: bool
    front: bool
    message: str


@dataclass(frozen=True)
class SlicePoint:
    x: object
    value: float
    uniform: bool
    number: int


@dataclass(frozen=True)
class Slice:
    """Value against one parameter. ``numeric`` says how to draw x, ``log`` that it spans 8× or more."""

    name: str
    numeric: bool
    log: bool
    points: list[SlicePoint]


def method_of(trial: TrialRecord) -> str | None:
    """The method a trial used, or None when the record does not say."""
    method = getattr(trial, "method", None) or trial.params.get("method")
    return None if method is None else str(method)


def is_uniform(trial: TrialRecord) -> bool:
    """Whether the trial gave every layer the same rank: by its method, else by its role."""
    method = method_of(trial)
    return "uniform" in (method if method is not None else trial.role)


def trial_rows(sweep: SweepRecord) -> list[TrialRow]:
    rows = []
    for trial in sweep.trials:
        method = method_of(trial) or ("uniform" if is_uniform(trial) else "")
        shown = {k: v for k, v in trial.params.items() if k != "method"}
        rows.append(
            TrialRow(
                number=trial.number,
                role=trial.role,
                method=method,
                uniform=is_uniform(trial),
                params=", ".join(f"{k}\u00a0=\u00a0{_short(v)}" for k, v in shown.items()),
                value=trial.value,
                ranks=trial.ranks,
                adapter_params=trial.adapter_params,
                seconds=trial.seconds,
                state=trial.state,
                best=trial.number == sweep.best,
                front=trial.number in sweep.front,
                message=trial.message or "",
            )
        )
    return rows


def front_points(rows: list[TrialRow]) -> list[TrialRow]:
    """Completed trials with a size and a value, by size: what the front's figure shows."""
    usable = [r for r in rows if r.value is not None and r.adapter_params is not None and r.state == "complete"]
    return sorted(usable, key=lambda r: (r.adapter_params, r.number))


def importances(sweep: SweepRecord) -> list[tuple[str, float]]:
    """Parameters by importance, most important first; ties by name."""
    return sorted(sweep.importances.items(), key=lambda pair: (-pair[1], pair[0]))


def slices(sweep: SweepRecord) -> list[Slice]:
    """One slice for each parameter that took more than one value in completed trials."""
    names = list(dict.fromkeys(name for trial in sweep.trials for name in trial.params))
    made = []
    for name in names:
        points = [
            SlicePoint(t.params[name], t.value, is_uniform(t), t.number)
            for t in sweep.trials
            if name in t.params and t.value is not None and t.state == "complete"
        ]
        if len({repr(p.x) for p in points}) < 2:
            continue
        numeric = all(isinstance(p.x, (int, float)) and not isinstance(p.x, bool) for p in points)
        log = numeric and min(p.x for p in points) > 0 and max(p.x for p in points) >= 8 * min(p.x for p in points)
        made.append(Slice(name, numeric, log, points))
    return made


def control_of(sweep: SweepRecord) -> TrialRecord | None:
    """The uniform trial that the best one is set beside: the pair's, else the best completed one."""
    if sweep.pair is not None:
        return next((t for t in sweep.trials if t.number == sweep.pair.uniform), None)
    done = [t for t in sweep.trials if is_uniform(t) and t.state == "complete" and t.value is not None]
    sign = -1 if sweep.direction == "maximize" else 1
    return min(done, key=lambda t: (sign * t.value, t.number), default=None)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
