"""``sweep --worker``: one more process, on any machine, that trains trials of a sweep. All it needs is the storage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..errors import ConfigError
from ..experiments.launched import require_alone
from .output import results_only, say
from .progress import trial_line


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
