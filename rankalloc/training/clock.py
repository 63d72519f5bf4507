"""Wall-clock time of a run and of its steps."""

from __future__ import annotations

import statistics
import time


class StepClock:
    """Time since the last look, and seconds between steps before and after the freeze."""

    def __init__(self) -> None:
        self._looked = time.perf_counter()
        self._last_step: float | None = None
        self._durations: dict[bool, list[float]] = {False: [], True: []}

    @property
    def started(self) -> bool:
        """Whether a step has been counted."""
        return self._last_step is not None

    def step(self, frozen: bool) -> None:
        """Count one step; the time since the one before belongs to it."""
        now = time.perf_counter()
        if self._last_step is not None:
            self._durations[frozen].append(now - self._last_step)
        self._last_step = now

    def lap(self) -> float:
        """Seconds since the last lap, or since the clock was made or :meth:`restart`."""
        now = time.perf_counter()
        passed, self._looked = now - self._looked, now
        return passed

    def restart(self) -> None:
        """Begin a lap now: a run was resumed."""
        self._looked = time.perf_counter()

    def median(self, frozen: bool) -> float | None:
        """Median seconds of a step before, or after, the freeze; None without any."""
        values = self._durations[frozen]
        return statistics.median(values) if values else None
