"""A trial in several processes (``sweep.processes``): a torchrun job of its own, which the worker starts and watches.

The job gets a request as a file in the trial's folder, and leaves the trace there, or a file with the reason why not.
Such trials are not stopped early: what their processes find in the middle does not reach the study.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ... import errors
from ...errors import RankallocError
from ...files import write_json
from ...trace import RankTrace
from ..config import RunConfig
from ..launched import is_first
from ..preemption import Preempted, Stop
from ..run_folder import RunFolder
from ..runner import train

REQUEST, OUTCOME = ".request.json", ".outcome.json"
_POLL = 0.2
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def train_in_processes(
    processes: int, run: RunConfig, place: RunFolder, *, command: str, resume: bool, group: str,
    stop: Callable[[], bool] | None = None,
) -> RankTrace:
    """:func:`rankalloc.experiments.runner.train` of a trial under torchrun.

    Raises:
        Preempted: ``stop`` said so; the job has written a checkpoint.
        RankallocError: the job failed; of the same kind and with the same message as in one process.
    """
    place.path.mkdir(parents=True, exist_ok=True)
    outcome = place.path / OUTCOME
    outcome.unlink(missing_ok=True)
    request = write_json(
        place.path / REQUEST,
        {"config": run.model_dump(mode="json"), "command": command, "resume": resume, "group": group},
    )
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    job = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m",
         "rankalloc.experiments.sweeps.launching", str(request)],
        stdout=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    asked = False
    try:
        while job.poll() is None:
            if stop is not None and stop() and not asked:
                asked = True
                job.terminate()
            time.sleep(_POLL)
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait()
    if outcome.is_file():
        found = json.loads(outcome.read_text(encoding="utf-8"))
        kind = Preempted if found["kind"] == "Preempted" else getattr(errors, found["kind"], RankallocError)
        raise kind(found["message"])
    if asked:
        raise Preempted("stopped before the first checkpoint")
    if job.returncode:
        raise RankallocError(f"torchrun ended with exit code {job.returncode}; its messages are printed above")
    request.unlink()
    return RankTrace.load(place.trace)


def main(request: Path) -> int:
    """One process of the job."""
    from ...storage.quiet import quiet
    from ..tasks import prepare

    found: dict[str, Any] = json.loads(request.read_text(encoding="utf-8"))
    run, folder = RunConfig.model_validate(found["config"]), request.parent
    with Stop().on_sigterm() as stop:
        try:
            with quiet():
                train(
                    run, folder, prepared=prepare(run), splits=("tune",), command=found["command"],
                    resume=found["resume"], stop=stop, group=found["group"],
                )
        except RankallocError as error:
            if is_first():
                write_json(folder / OUTCOME, {"kind": type(error).__name__, "message": str(error)})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
