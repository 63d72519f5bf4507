"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .output import about, clean, console, number, say

if TYPE_CHECKING:
    from ..trace import TrialRecord

_INTERVAL = 30  # seconds between two plain lines of a Bar


class Steps:
    """The ``progress`` callback of a run, as a context manager: called with (step, total steps, newest values).

    Args:
        first: called once, after the first step.

    Attributes:
        started: whether a step has been made.
    """

    def __init__(self, first: Callable[[], Any] | None = None) -> None:
        self._first = first
        self._printed = 0
        self._said: set[tuple[str, Any]] = set()
        self.started = False
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Steps:
        out = console(stderr=True)
        if out.is_interactive and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False), console=out,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=None)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, step: int, total: int, values: dict[str, Any]) -> None:
        if not self.started:
            self.started = True
            if self._first is not None:
                self._first()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=total, description=clean(_shown(values)))
        elif not self._printed or step == total or step - self._printed >= total / 10:
            self._printed = step
            old = {name: value for name, value in values.items() if " at step " in name}  # said once
            fresh = {name: value for name, value in values.items() if (name, value) not in self._said}
            self._said = set(old.items())
            say(f"step {step:>{len(str(total))}}/{total}  {_shown(fresh)}".rstrip())


class Bar:
    """The ``progress`` callback of work that is usually short, as a context manager: a bar on a terminal after 2 s,
    a plain line every half minute elsewhere. A new total begins a new bar."""

    def __init__(self) -> None:
        self._started = self._printed = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, values: dict[str, Any]) -> None:
        if self._bar is None:
            out, now = console(stderr=True), time.monotonic()
            if not (out.is_interactive and sys.stderr.isatty()):
                if now - self._printed >= _INTERVAL:
                    self._printed = now
                    say(f"{done}/{total}  {_shown(values)}".rstrip())
                return
            if now - self._started < 2:
                return
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False),
                                 console=out, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, completed=done, total=total, description=clean(_shown(values)))


def _shown(values: dict[str, Any]) -> str:
    return "  ".join(f"{name} {number(value)}" for name, value in values.items())


class Trials:
    """The ``on_trial`` callback of a sweep, as a context manager: a line per trial, and on a terminal a bar under them
    with the best so far, how many were stopped or failed, and the time left; elsewhere the time left is in the line."""

    def __init__(self, metric: str, direction: str) -> None:
        self.metric, self._sign = metric, -1 if direction == "maximize" else 1
        self._bar: Any = None
        self._task: Any = None
        self._states: list[str] = []
        self._best: float | None = None
        self._begun: tuple[float, int] | None = None

    def __enter__(self) -> Trials:
        out = console(stderr=True)
        if out.is_interactive and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False), console=out,
                transient=True,
            )
        self._started = time.monotonic()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, trial: TrialRecord, done: int, total: int) -> None:
        from ..trace import FRESH_SEED

        counted = not trial.role.startswith(FRESH_SEED)
        self._states += [trial.state] if counted else []
        if trial.value is not None and counted and not trial.over:
            self._best = min((self._best, trial.value), key=self._order)
        now = time.monotonic()
        if self._begun is None:  # what an earlier sweep has done says nothing of this one's pace
            self._begun = (self._started, done - 1)
        begun, before = self._begun
        left = (total - done) * (now - begun) / max(1, done - before)
        line = f"{done}/{total}  {trial_line(trial, self.metric)}"
        if self._bar is None:
            return say(f"{line}  {about(left)} left" if done < total else line)
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.console.print(clean(line), soft_wrap=True)
        self._bar.update(self._task, completed=done, total=total, description=self._shown(left, done < total))
        return None

    def _order(self, value: float | None) -> float:
        return float("inf") if value is None else self._sign * value

    def _shown(self, left: float, going_on: bool) -> str:
        parts = [f"best {self.metric} {number(self._best)}"] if self._best is not None else []
        for state, said in (("pruned", "stopped early"), ("failed", "failed")):
            if amount := self._states.count(state):
                parts.append(f"{amount} {said}")
        parts.append(f"{about(left)} left" if going_on else "the best again, with fresh seeds")
        return " · ".join(parts)


def trial_line(trial: TrialRecord, metric: str) -> str:
    """Number, role, point, result and seconds of a trial, on one line."""
    parts = [f"trial {trial.number}", trial.role, *_point(trial.params)]
    if trial.state == "complete":
        parts.append(f"{metric} {number(trial.value)}")
        parts += [f"over the limit of {name}" for name in trial.over]
    else:
        parts.append(f"{trial.state}: {trial.message}" if trial.message else trial.state)
    if trial.seconds is not None:
        parts.append(f"{trial.seconds:.0f} s")
    return "  ".join(parts)


def _point(params: dict[str, Any]) -> list[str]:
    short = {"learning_rate": "lr"}
    return [
        str(value) if name == "method" else f"{short.get(name, name)} {number(value)}" for name, value in params.items()
    ]
