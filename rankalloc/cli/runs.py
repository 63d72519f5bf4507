"""What ``train`` and ``sweep`` do around the runner: settle the folder, run, report, say how to go on."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import ConfigError, RankallocError
from .endings import INTERRUPTED
from .output import results_only, say
from .progress import Steps, trial_printer

if TYPE_CHECKING:
    from ..experiments.config import RunConfig

_CHECKPOINTS = "checkpoint-[0-9]*"
_STUDY = "study.db"


@dataclass(frozen=True)
class Request:
    """One command as it was given."""

    command: str
    path: str | None
    overrides: list[str]
    output: str | None
    dry_run: bool = False
    as_json: bool = False
    trials: int | None = None
    storage: str | None = None

    def load(self) -> RunConfig:
        """The resolved configuration; ConfigError with every mistake."""
        from ..experiments.config import load_config

        config = load_config(self.path, self.overrides)
        if self.output == "":
            raise ConfigError("--output is empty; give a folder, or leave it out")
        return config if self.output is None else config.replaced({"output": self.output})

    def folder(self, config: RunConfig) -> str:
        """The output folder, written as the user wrote it."""
        return config.output or str(config.folder)

    def line(self, *flags: str, whole: bool = True) -> str:
        """The command line again. Not ``whole``: only what decides the result, for records that are
        passed on (a storage URL may hold a password)."""
        words = ["rankalloc", self.command, *([self.path] if self.path is not None else [])]
        for override in self.overrides:
            words += ["--set", override]
        if self.trials is not None:
            words += ["--trials", str(self.trials)]
        if whole:
            if self.storage is not None:
                words += ["--storage", self.storage]
            if self.output is not None:
                words += ["--output", self.output]
            words += ["--json"] if self.as_json else []
        return shlex.join([*words, *flags])


def run_train(request: Request, *, resume: bool, overwrite: bool) -> None:
    """``rankalloc train``."""
    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite replaces it; give one of them")
    config = request.load()
    folder = request.folder(config)
    refusal = _occupied(folder, resume, overwrite)
    if request.dry_run:
        from .dry_run import dry_run

        return dry_run(config, request, folder, note=refusal)
    if refusal:
        raise RankallocError(refusal)

    from .summary import show_run

    # An old run goes once the new one has made a step: a mistake before that costs nothing.
    steps = Steps(first=(lambda: _discard(folder)) if overwrite else None)
    how = functools.partial(_how_to_go_on, request, folder, steps, overwrite)
    with _resumable(how), results_only():
        say(f"training {_task_name(config)} with {config.method} into {folder}")
        from ..experiments.runner import train

        with _training(), steps:
            trace = train(config, Path(folder), command=request.line(whole=False), resume=resume, progress=steps)
        report, failure = _report(folder)
    show_run(trace, config, folder, report, request.as_json)
    _raise(failure, folder)


def run_sweep(request: Request) -> None:
    """``rankalloc sweep``."""
    config = request.load()
    folder = request.folder(config)
    refusal = _holds_a_run(folder)
    if request.dry_run:
        from .dry_run import dry_run

        return dry_run(config, request, folder, note=refusal)
    if refusal:
        raise RankallocError(refusal)

    from .summary import show_sweep

    with _resumable(lambda: f"to go on: {request.line()}"), results_only():
        going_on = request.storage is None and Path(folder, _STUDY).exists()
        say(f"going on with the sweep in {folder}" if going_on else f"sweeping {_task_name(config)} into {folder}")
        from ..experiments.sweep import run_sweep as run
        from ..experiments.tasks import metric_of

        with _training():
            record = run(
                config, Path(folder), trials=request.trials, storage=request.storage,
                command=request.line(whole=False), on_trial=trial_printer(metric_of(config).metric),
            )
        report, failure = _report(folder)
    show_sweep(record, folder, report, request.as_json)
    _raise(failure, folder)


@contextlib.contextmanager
def _training() -> Iterator[None]:
    """Around what trains: no library speaks up, and on the CPU the process keeps what it frees."""
    import torch

    from ..storage.quiet import quiet
    from ..training.host_memory import keep_freed_memory

    if not torch.accelerator.is_available():
        keep_freed_memory()
    with quiet():
        yield


def _task_name(config: RunConfig) -> str:
    return config.task if isinstance(config.task, str) else config.task.kind


def _occupied(folder: str, resume: bool, overwrite: bool) -> str | None:
    """Why a run may not start in ``folder``; None when it may."""
    from ..trace import SWEEP_NAME, TRACE_NAME

    path = Path(folder)
    if path.exists() and not path.is_dir():
        return f"{folder} is a file; give --output a folder"
    if (path / SWEEP_NAME).exists() or (path / _STUDY).exists():
        return f"{folder} holds a sweep; give --output another folder"
    if resume or overwrite:
        return None
    if (path / TRACE_NAME).exists():
        return f"{folder} holds a finished run; give --output another folder, or --overwrite to replace it"
    if any(path.glob(_CHECKPOINTS)):
        return f"{folder} holds a run that was not finished; go on with --resume, or replace it with --overwrite"
    return None


def _holds_a_run(folder: str) -> str | None:
    from ..trace import TRACE_NAME

    path = Path(folder)
    if path.exists() and not path.is_dir():
        return f"{folder} is a file; give --output a folder"
    if (path / TRACE_NAME).exists() or any(path.glob(_CHECKPOINTS)):
        return f"{folder} holds a single run; give --output another folder for the sweep"
    return None


def _discard(folder: str) -> None:
    """Remove what the run before left, or its checkpoints would be resumed from as if they were new."""
    from ..experiments.runner import ADAPTER_FOLDER
    from ..trace import TRACE_NAME

    path = Path(folder)
    for name in (TRACE_NAME, "report.html", "report.json"):
        with contextlib.suppress(FileNotFoundError):
            (path / name).unlink()
    for old in (path / ADAPTER_FOLDER, *path.glob(_CHECKPOINTS)):
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)


@contextlib.contextmanager
def _resumable(hint: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted; {hint()}")
        raise typer.Exit(INTERRUPTED) from None


def _how_to_go_on(request: Request, folder: str, steps: Steps, overwrite: bool) -> str:
    again = request.line(*(["--overwrite"] if overwrite else []))
    if overwrite and not steps.started:
        return f"the run that {folder} holds is untouched; to start again: {again}"
    if any(Path(folder).glob(_CHECKPOINTS)):
        return f"to go on: {request.line('--resume')}"
    return f"no checkpoint was written yet (training.save_every=N has them written); to start again: {again}"


def _report(folder: str) -> tuple[str | None, Exception | None]:
    """Write the folder's report. What goes wrong is given back, not raised: the run's own summary comes first."""
    page = os.path.join(folder, "report.html")
    try:
        from ..report import write_report

        write_report(folder, page)
    except Exception as error:
        return None, error
    return page, None


def _raise(failure: Exception | None, folder: str) -> None:
    if failure is not None:
        say(f"all is saved but the report; to write it again: {shlex.join(['rankalloc', 'report', folder])}")
        raise failure
