"""Several workers on this machine: processes that are started, watched, and replaced when they die.

Each is ``rankalloc sweep --worker`` on the sweep's storage, with its share of the CPU's threads and, where there are
any, one of the accelerators. A process that dies without a word (out of memory, kill -9) costs the trial it was in a
start, and another one takes its place.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from optuna.trial import FrozenTrial

from ...errors import RankallocError
from ..preemption import Preempted, Stop
from .finals import left
from .record import Sweep
from .slots import FRESH, Slots, ended
from .worker import Failures, take_up

_POLL = 0.2
_GRACE = 120  # seconds that workers get to write a checkpoint
_IN_A_ROW = 3  # workers that end with an error before any trial has ended
PREEMPTED = 143
"""Exit code of a process that stopped at SIGTERM, as shells have it."""


def in_processes(
    jobs: int, sweep: Sweep, slots: Slots, storage: str, wanted: int, stop: Stop,
    on_trial: Callable[[FrozenTrial, int], None],
) -> None:
    """Run ``jobs`` workers until all ``wanted`` slots have a result; raises as :func:`workers_on`."""
    workers_on(
        jobs, slots, lambda: left(slots, sweep.config, wanted), stop, on_trial,
        worker_command("sweep", storage, sweep.config.name, sweep.folder.path), sweep.config.sweep.processes,
    )


def worker_command(command: str, storage: str, study: str, folder: Path) -> list[str]:
    """The command line of a worker that ends with this process."""
    return [
        sys.executable, "-m", "rankalloc", command, "--worker", storage, "--study", study, "--output", str(folder),
        "--parent", str(os.getpid()),
    ]


def workers_on(
    jobs: int, slots: Slots, remaining: Callable[[], int], stop: Stop, on_trial: Callable[[FrozenTrial, int], None],
    command: list[str], processes: int = 1, alike: Failures | None = None,
) -> None:
    """Run ``jobs`` workers, each of them ``command``, while runs are ``remaining``; a trial takes ``processes`` of its
    own.

    Raises:
        Preempted: ``stop`` said so; the workers have put their trials back.
        RepeatedFailureError: trials fail one after another for the same reason.
        RankallocError: workers end with an error, one after another.
    """
    told = {slot for slot, trial in _runs(slots).items() if ended(trial)}
    workers: dict[int, subprocess.Popen[bytes]] = {}
    failures, alike = 0, alike or Failures()
    try:
        while runs := remaining():
            if stop():
                raise Preempted("stopped")
            waiting = min(jobs, runs)
            for place in range(waiting):
                if place not in workers:
                    workers[place] = subprocess.Popen(command, env=_surroundings(place, jobs, processes))
            time.sleep(_POLL)
            for place, process in list(workers.items()):
                if process.poll() is None:
                    continue
                del workers[place]
                take_up(slots, (process.pid,))
                if process.returncode > 0 and process.returncode != PREEMPTED:
                    failures += 1
                    if failures >= _IN_A_ROW:
                        raise RankallocError(
                            f"{failures} workers ended with an error (exit code {process.returncode}); it is printed "
                            "above"
                        )
            for trial in _news(slots, told, on_trial):
                failures = 0
                alike.see(trial)
    finally:
        _end(list(workers.values()))
        for process in workers.values():
            take_up(slots, (process.pid,))
    for _ in _news(slots, told, on_trial):
        pass


def _runs(slots: Slots) -> dict[int, FrozenTrial]:
    return {**slots.all(), **slots.again()}


def _news(slots: Slots, told: set[int], on_trial: Callable[[FrozenTrial, int], None]) -> Iterator[FrozenTrial]:
    """Those that have ended since, each of which is told."""
    for slot, trial in _runs(slots).items():
        if ended(trial) and slot not in told:
            told.add(slot)
            on_trial(trial, sum(slot < FRESH for slot in told))
            yield trial


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    """Ask all to stop, and wait; a worker without a trial stops at once."""
    for process in workers:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in workers:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _surroundings(place: int, jobs: int, each: int) -> dict[str, str]:
    """The environment of a worker whose trials take ``each`` processes: its threads, and its accelerators."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (jobs * each))))
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        given = environment.get("CUDA_VISIBLE_DEVICES", "")
        names = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
        own = dict.fromkeys(names[(place * each + index) % len(names)] for index in range(each))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return environment
