"""What ``train`` and ``sweep`` do around the runner: check the folder, run, report, say how to continue."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import ConfigError, RankallocError
from ..experiments.launched import is_first, processes, require_alone
from ..experiments.run_folder import REPORT_NAME, RunFolder, SweepFolder, content
from .endings import INTERRUPTED
from .output import count, results_only, say
from .progress import Steps, Trials
from .request import Request

if TYPE_CHECKING:
    from ..experiments.config import RunConfig
    from ..trace import SweepRecord


def run_train(request: Request, *, resume: bool, overwrite: bool) -> None:
    """``rankalloc train``."""
    if resume and overwrite:
        raise ConfigError("--resume continues a run and --overwrite replaces it; give one of them")
    config = request.load()
    folder = request.folder(config)
    refusal = _no_run_in(folder, resume, overwrite)
    if request.dry_run:
        from .dry_run import dry_run

        return dry_run(config, request, folder, note=refusal)
    if refusal:
        raise RankallocError(refusal)

    from .summary import show_run

    if resume and _show_finished(config, folder, request.as_json):
        return None
    # An old run is removed once the new one has made a step: a mistake before that costs nothing.
    steps = Steps(first=RunFolder(Path(folder)).discard if overwrite else None)
    how = functools.partial(_how_to_continue, request, folder, steps, overwrite)
    with resumable(how), results_only():
        together = f" in {processes()} processes" if processes() > 1 else ""
        say(f"training {_task_name(config)} with {config.method} into {folder}{together}")
        from ..experiments.preemption import Stop
        from ..experiments.runner import train

        with training(), steps, Stop().on_sigterm() as stop:
            trace = train(
                config, Path(folder), command=request.line(whole=False), resume=resume, progress=steps, stop=stop
            )
        report, failure = report_in(folder)
    show_run(trace, config, folder, report, request.as_json)
    raise_later(failure, folder)


def _show_finished(config: RunConfig, folder: str, as_json: bool) -> bool:
    """Show the run that ``folder`` holds, when it is finished; whether it is. A report that it lacks is written."""
    if not RunFolder(Path(folder)).trace.exists():
        return False
    from ..experiments.runner import finished
    from .summary import show_run

    trace = finished(config, Path(folder))
    if trace is None:
        return False
    # the reader was not recorded at first
    then, now = (
        {"reader": None, **settings, "output": None} for settings in (trace.config, config.model_dump(mode="json"))
    )
    changed = "" if then == now else (
        f"; its settings ({RunFolder(Path(folder)).config}) are others than these, and --overwrite trains it again"
    )
    say(f"{folder} holds a finished run of {count(trace.steps_done, 'step')}: nothing to resume{changed}")
    page = RunFolder(Path(folder)).report
    report, failure = (str(page), None) if page.exists() else report_in(folder)
    show_run(trace, config, folder, report, as_json)
    raise_later(failure, folder)
    return True


def run_sweep(request: Request) -> None:
    """``rankalloc sweep``."""
    require_alone("sweep")
    config = request.load()
    folder = request.folder(config)
    refusal = _no_sweep_in(folder)
    if request.dry_run:
        from .dry_run import dry_run

        return dry_run(config, request, folder, note=refusal)
    if refusal:
        raise RankallocError(refusal)

    from ..experiments.preemption import Stop
    from .summary import show_sweep

    with resumable(lambda: f"to continue: {request.line()}"), Stop().on_sigterm() as stop, results_only():
        continued = request.storage is None and SweepFolder(Path(folder)).study.exists()
        say(f"continuing the sweep in {folder}" if continued else f"sweeping {_task_name(config)} into {folder}")
        from ..experiments.sweeps.sweep import run_sweep as run
        from ..experiments.tasks import metric_of

        judged, trained = metric_of(config), []
        told = Trials(judged.metric, judged.direction)

        def on_trial(*trial: Any) -> None:
            trained.append(trial)
            told(*trial)

        with training(), told:
            record = run(
                config, Path(folder), trials=request.trials, storage=request.storage,
                jobs=request.jobs, command=request.line(whole=False), on_trial=on_trial, stop=stop,
            )
        if not trained:
            say(f"the sweep had finished: {count(len(record.trials), 'trial')}, and none was trained now")
        report, failure = report_in(folder)
        if trained and failure is None:
            _publish(Path(folder), request.storage, record)
    show_sweep(record, folder, report, request.as_json)
    raise_later(failure, folder)


def _publish(folder: Path, storage: str | None, record: SweepRecord) -> None:
    """Put verdict and files beside the study. Everything is saved by then: what fails is told, and fails nothing."""
    from ..experiments.sweeps.publishing import publish

    try:
        publish(folder, storage, record)
    except Exception as error:
        say(f"the study got no verdict and no files for optuna-dashboard: {type(error).__name__}: {error}")


@contextlib.contextmanager
def training() -> Iterator[None]:
    """While training: no library prints, and on the CPU the process keeps the memory it frees."""
    import torch

    from ..storage.quiet import quiet
    from ..training.host_memory import keep_freed_memory

    if not torch.accelerator.is_available():
        keep_freed_memory()
    with quiet(), warnings.catch_warnings():
        # what libraries tell each other about names to come, and DDP about the layout of thin matrices
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Grad strides do not match", UserWarning)
        yield


def _task_name(config: RunConfig) -> str:
    return config.task if isinstance(config.task, str) else config.task.kind


def _no_run_in(folder: str, resume: bool, overwrite: bool) -> str | None:
    """Why a run may not start in ``folder``; None when it may."""
    found = content(Path(folder))
    if found == "a file":
        return f"{folder} is a file; give --output a folder"
    if found in ("a sweep", "an audit"):
        return f"{folder} holds {found}; give --output another folder"
    if resume or overwrite:
        return None
    if found == "a finished run":
        return f"{folder} holds a finished run; give --output another folder, or --overwrite to replace it"
    if found == "an unfinished run":
        return f"{folder} holds an unfinished run; continue it with --resume, or replace it with --overwrite"
    return None


def _no_sweep_in(folder: str) -> str | None:
    """Why a sweep may not start in ``folder``; None when it may."""
    found = content(Path(folder))
    if found == "a file":
        return f"{folder} is a file; give --output a folder"
    if found in ("a finished run", "an unfinished run"):
        return f"{folder} holds a single run; give --output another folder for the sweep"
    if found == "an audit":
        return f"{folder} holds an audit; give --output another folder for the sweep"
    return None


@contextlib.contextmanager
def resumable(hint: Callable[[], str]) -> Iterator[None]:
    """An interrupted command says how to continue, and has the exit code of one."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted; {hint()}")
        raise typer.Exit(INTERRUPTED) from None
    except RankallocError as error:
        from ..experiments.preemption import Preempted
        from ..experiments.sweeps.jobs import PREEMPTED

        if not isinstance(error, Preempted):
            raise
        say(f"stopped; {hint()}")
        raise typer.Exit(PREEMPTED) from None


def _how_to_continue(request: Request, folder: str, steps: Steps, overwrite: bool) -> str:
    again = request.line(*(["--overwrite"] if overwrite else []))
    if overwrite and not steps.started:
        return f"the run that {folder} holds is untouched; to start again: {again}"
    if RunFolder(Path(folder)).checkpoints():
        return f"to continue: {request.line('--resume')}"
    return f"no checkpoint was written yet (training.save_every=N writes them); to start again: {again}"


def report_in(folder: str) -> tuple[str | None, Exception | None]:
    """Write the folder's report. An error is returned, not raised: the run's own summary comes first."""
    page = os.path.join(folder, REPORT_NAME)
    if not is_first():
        return page, None
    try:
        from ..report import write_report

        write_report(folder, page)
    except Exception as error:
        return None, error
    return page, None


def raise_later(failure: Exception | None, folder: str) -> None:
    """Raise why there is no report, once all else has been shown."""
    if failure is not None:
        say(f"everything but the report is saved; to write it again: {shlex.join(['rankalloc', 'report', folder])}")
        raise failure
