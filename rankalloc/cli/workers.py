"""What is done with the storage of a sweep alone, on any machine: ``sweep --worker`` trains trials of it, ``sweep
--status`` shows how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..errors import ConfigError
from ..experiments.launched import require_alone
from .output import about, count, results_only, say, show_json, show_table
from .progress import trial_line
from .summary import fresh_row


def run_worker(
    storage: str, study: str | None, output: str | None, parent: int | None, others: Sequence[str]
) -> None:
    """Train until the sweep has all its trials. ``parent``: the process that started this one, and prints for it;
    ``others``: what was given besides."""
    if others:
        raise ConfigError(
            f"a --worker is told by its storage what to do; leave out {', '.join(others)} (it takes --study and "
            "--output)"
        )
    require_alone("sweep")
    with results_only():
        from ..experiments.kept_base import with_kept_base
        from ..experiments.preemption import Preempted, Stop
        from ..experiments.run_folder import SweepFolder
        from ..experiments.sweeps import storages
        from ..experiments.sweeps.jobs import PREEMPTED
        from ..experiments.sweeps.record import Sweep, trial_record
        from ..experiments.sweeps.study import join_study
        from ..experiments.sweeps.worker import work
        from ..experiments.tasks import prepare
        from .endings import INTERRUPTED
        from .runs import training

        with Stop().with_parent(parent).on_sigterm() as stop:
            storage = storages.named(storage)
            slots, run, wanted = join_study(storage, study)
            folder = Path(output) if output is not None else run.folder
            if parent is None:
                say(f"training trials of {run.name} into {folder}: {slots.left(wanted)} of {wanted} are left")
            with training():
                prepared = with_kept_base(prepare(run), run.adapter.modules_to_save)
                sweep = Sweep(run, SweepFolder(folder), prepared, storages.shown(storage), None)

                def on_trial(trial: Any, done: int) -> None:
                    if parent is None:
                        line = trial_line(trial_record(trial, run, folder), sweep.prepared.metric)
                        say(f"{done}/{wanted}  {line}")

                try:
                    work(sweep, slots, wanted, stop, on_trial)
                except Preempted:
                    if parent is None:
                        say("stopped; the trial in hand goes on where the next worker takes it up")
                    raise typer.Exit(PREEMPTED) from None
                except KeyboardInterrupt:
                    raise typer.Exit(INTERRUPTED) from None
            if parent is None:
                say("every trial has a result; rankalloc sweep with the configuration and this storage concludes it")


def show_status(storage: str, study: str | None, as_json: bool, others: Sequence[str]) -> None:
    """Print how far a sweep is."""
    if others:
        raise ConfigError(f"--status only looks; leave out {', '.join(others)} (it takes --study and --json)")
    from ..experiments.sweeps.status import status_of

    found = status_of(storage, study)
    if as_json:
        plain = {name: value for name, value in vars(found).items() if name not in ("best", "running", "failed")}
        return show_json({
            **plain, "best": None if found.best is None else found.best.model_dump(),
            "running": [{**vars(one), "trial": one.trial.model_dump()} for one in found.running],
            "failed": [trial.model_dump() for trial in found.failed],
        })
    ended = found.wanted - found.counts.get("waiting", 0) - found.counts.get("running", 0)
    states = ", ".join(f"{amount} {state}" for state, amount in sorted(found.counts.items()))
    left = [("time left", about(found.seconds_left))] if found.seconds_left else []
    show_table([
        ("sweep", found.name), ("trials", f"{ended} of {found.wanted} have ended: {states}"),
        *([("fresh seeds", f"{count(found.fresh_left, 'run')} of the best trials left")] if found.fresh_left else []),
        *([("best", trial_line(found.best, found.metric)), *fresh_row(found.best)] if found.best else []),
        *([("best", "no trial keeps the limits so far")] if not found.best and found.counts.get("complete") else []),
        *(("running", f"{trial_line(one.trial, found.metric)}  {one.worker}  for {about(one.seconds)}")
          for one in found.running),
        *(("failed", trial_line(trial, found.metric)) for trial in found.failed),
        *left,
    ])  # fmt: skip
