"""Sweeps whose workers are killed and preempted again and again, on every kind of storage, PostgreSQL among them.

``STORMS`` says how often a worker is killed, and how often one is preempted (10).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankalloc.experiments.run_folder import SweepFolder
from rankalloc.experiments.runner import train
from rankalloc.experiments.sweeps import storages
from rankalloc.experiments.sweeps.slots import Slots, ended
from rankalloc.experiments.sweeps.study import join_study
from rankalloc.experiments.sweeps.trial_runs import run_of
from rankalloc.trace import SweepRecord
from tests.support.runs import small_yaml

pytestmark = [pytest.mark.long, pytest.mark.service]
KINDS = pytest.mark.parametrize("storage", ["sqlite", "journal", "postgresql"], indirect=True)
STORMS = int(os.environ.get("STORMS", 10))
ROOT = Path(__file__).parents[2]
SETTINGS = ["training.steps=150", "training.save_every=50", "data.limit_train=40", "sweep.pruner=none"]


def surroundings() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def sweep(config: Path, storage: str, folder: Path, trials: int, *words: str) -> subprocess.Popen:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    command = [sys.executable, "-m", "rankalloc", "sweep", str(config), "--storage", storage, "--output", str(folder),
               "--trials", str(trials), *sets, *words]
    return subprocess.Popen(command, env=surroundings(), stdout=subprocess.DEVNULL)


def children(pid: int) -> list[int]:
    """The workers among the processes that ``pid`` has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            try:
                words = Path(f"/proc/{child}/cmdline").read_text()
            except OSError:
                continue
            if "--worker" in words:
                found.append(int(child))
    return found


def results(storage: str) -> dict[int, tuple]:
    try:
        slots, _, _ = join_study(storage, None)
    except Exception:
        return {}  # not begun yet
    return {slot: (trial.params, trial.value) for slot, trial in slots.all().items() if ended(trial)}


@KINDS
def test_storms_cost_no_trial_and_no_bit(storage, tmp_path):
    draw, trials = random.Random(0), 16
    config, folder = small_yaml(tmp_path), tmp_path / "out"
    process = sweep(config, storage, folder, trials, "--jobs", "2")
    blows = [signal.SIGKILL, signal.SIGTERM] * STORMS
    known: dict[int, tuple] = {}
    struck = 0
    deadline = time.monotonic() + 900
    while process.poll() is None:
        assert time.monotonic() < deadline, "the sweep did not end"
        now = results(storage)
        assert all(now.get(slot) == result for slot, result in known.items()), "a finished trial was lost or changed"
        known = now
        running = _training(storage)
        workers = [pid for pid in children(process.pid) if pid in running]
        if blows and workers:
            os.kill(draw.choice(workers), blows.pop())
            struck += 1
        time.sleep(draw.random())
    assert process.returncode == 0
    record = SweepRecord.load(folder / "sweep.json")
    assert [(trial.number, trial.state) for trial in record.trials] == [(n, "complete") for n in range(trials)]
    slots, found, wanted = join_study(storage, None)
    assert wanted == trials and struck == 2 * STORMS, f"only {struck} blows fell: give the sweep longer trials"
    points = [tuple(sorted(trial.params.items())) for trial in slots.all().values()
              if "match_params" not in trial.user_attrs]
    assert len(set(points)) == len(points), "two trials at one point"
    for slot, trial in slots.all().items():
        run = run_of(found, trial.user_attrs, slot, trial.params)
        train(run, tmp_path / "again" / str(slot), splits=())
        weights = [place / "adapter" / "adapter_model.safetensors"
                   for place in (SweepFolder(folder).trial(slot).path, tmp_path / "again" / str(slot))]
        assert weights[0].read_bytes() == weights[1].read_bytes(), f"trial {slot} is not the uninterrupted one"


def _training(storage: str) -> set[int]:
    """The processes that are in the middle of a trial, but for one that has ended three processes: five, and it counts
    as failed."""
    try:
        slots, _, _ = join_study(storage, None)
    except Exception:
        return set()
    running = [trial for trial in slots.all().values()
               if trial.state.name == "RUNNING" and trial.user_attrs.get("deaths", 0) < 3]
    return {int(trial.user_attrs.get("owner", ":0").rpartition(":")[2] or 0) for trial in running}


@KINDS
def test_sweeps_that_start_at_once_meet_the_total_together(storage, tmp_path):
    """Three whole sweeps on one study, each with an output folder of its own."""
    config = small_yaml(tmp_path)
    processes = [sweep(config, storage, tmp_path / str(number), 8) for number in range(3)]
    assert [process.wait(600) for process in processes] == [0, 0, 0]
    slots: Slots = join_study(storage, None)[0]
    assert [slot for slot, trial in slots.all().items() if ended(trial)] == list(range(8))
    records = [SweepRecord.load(tmp_path / str(number) / "sweep.json") for number in range(3)]
    assert len({record.best for record in records}) == 1 and len({record.pair.difference for record in records}) == 1
    values = [[(trial.number, trial.params, trial.value) for trial in record.trials] for record in records]
    assert values[0] == values[1] == values[2] and len(values[0]) == 8


@KINDS
def test_two_workers_get_through_more_where_trials_wait(storage, tmp_path):
    """Trials that only wait: what two processes gain is what the queue lets them."""
    def seconds(jobs: int, name: str) -> float:
        place = storages.opened(storage)
        del place  # the tables are there before the clock starts
        code = [sys.executable, "-m", "tests.services.waiting", storage, name]
        workers = [subprocess.Popen(code, env=surroundings(), stdout=subprocess.PIPE, text=True) for _ in range(jobs)]
        spans = [tuple(map(float, worker.communicate(timeout=300)[0].split())) for worker in workers]
        assert all(worker.returncode == 0 for worker in workers)
        return max(end for _, end in spans) - min(start for start, _ in spans)

    assert seconds(1, "one") / seconds(2, "two") >= 1.7
