"""The names in the folder of a run or a sweep, and what a folder holds.

A run's folder::

    config.yaml         the resolved configuration
    checkpoint-N/       the Trainer's checkpoints: an adapter, the exact weights that training changes, the optimizer
                        and the rank state; never the base
    adapter/            the result, as plain LoRA
    trace.json          the record; written last, so a folder with a trace is a finished run
    report.html, .json  the report and its data

A sweep's folder::

    config.yaml, report.html, .json
    study.db            the Optuna study, unless --storage names another place
    trials/0000/        one run's folder per trial, and 0000-seed-1/ … for its further seeds
    best/               a copy of the best trial's folder
    artifacts/          what optuna-dashboard shows with the study
    best.yaml           the configuration that trains the best trial again
    trials.csv          a row per trial
    sweep.json          the record; rewritten after every trial

An audit's folder::

    config.yaml, report.html, .json
    audit.db            the study, unless --storage names another place
    runs/auto/tune-0/   one run's folder per arm and rate, and seed-1/ … for each seed that arms are compared on
    audit.json          the record; rewritten after every run
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..audit_record import AUDIT_NAME, AUDIT_STUDY
from ..trace import SWEEP_NAME, SWEEP_STUDY, TRACE_NAME

ADAPTER_NAME = "adapter"
BEST_NAME = "best"
CONFIG_NAME = "config.yaml"
REPORT_NAME = "report.html"
STUDY_NAME = SWEEP_STUDY
TRIALS_NAME = "trials"
_CHECKPOINTS = "checkpoint-[0-9]*"

Content = Literal["nothing", "a file", "a finished run", "an unfinished run", "a sweep", "an audit"]


@dataclass(frozen=True)
class RunFolder:
    """The paths in the folder of one run."""

    path: Path

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER_NAME

    @property
    def config(self) -> Path:
        return self.path / CONFIG_NAME

    @property
    def report(self) -> Path:
        return self.path / REPORT_NAME

    @property
    def trace(self) -> Path:
        return self.path / TRACE_NAME

    def checkpoints(self) -> list[Path]:
        """The Trainer's checkpoints, in no order."""
        return list(self.path.glob(_CHECKPOINTS))

    def discard(self) -> None:
        """Remove what a run left here; its checkpoints would otherwise be resumed as if they were new."""
        for file in (self.trace, self.report, self.report.with_suffix(".json")):
            file.unlink(missing_ok=True)
        for folder in (self.adapter, *self.checkpoints()):
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)


@dataclass(frozen=True)
class SweepFolder:
    """The paths in the folder of a sweep."""

    path: Path

    @property
    def best(self) -> Path:
        return self.path / BEST_NAME

    @property
    def config(self) -> Path:
        return self.path / CONFIG_NAME

    @property
    def study(self) -> Path:
        return self.path / STUDY_NAME

    @property
    def record(self) -> Path:
        return self.path / SWEEP_NAME

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    @property
    def report(self) -> Path:
        return self.path / REPORT_NAME

    @property
    def best_config(self) -> Path:
        return self.path / "best.yaml"

    @property
    def table(self) -> Path:
        return self.path / "trials.csv"

    def trial(self, number: int, seed: int = 0) -> RunFolder:
        """The folder of one trial's run, or of the same with a further seed."""
        return RunFolder(self.path / TRIALS_NAME / (f"{number:04d}-seed-{seed}" if seed else f"{number:04d}"))

    def trial_at(self, number: int, budget: float) -> RunFolder:
        """The folder of one trial's recipe trained at another budget, a share."""
        return RunFolder(self.path / TRIALS_NAME / f"{number:04d}-at-{budget:.4g}")


@dataclass(frozen=True)
class AuditFolder:
    """The paths in the folder of an audit."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / CONFIG_NAME

    @property
    def study(self) -> Path:
        return self.path / AUDIT_STUDY

    @property
    def record(self) -> Path:
        return self.path / AUDIT_NAME

    @property
    def report(self) -> Path:
        return self.path / REPORT_NAME

    def run(self, arm: str, name: str) -> RunFolder:
        """The folder of one run: its arm's name, and its own."""
        return RunFolder(self.path / "runs" / arm / name)


def content(path: Path) -> Content:
    """What ``path`` holds. A folder with other files only, or with a run that wrote no checkpoint, holds nothing."""
    if path.exists() and not path.is_dir():
        return "a file"
    run, sweep, audit = RunFolder(path), SweepFolder(path), AuditFolder(path)
    if audit.record.exists() or audit.study.exists():
        return "an audit"
    if sweep.record.exists() or sweep.study.exists():
        return "a sweep"
    if run.trace.exists():
        return "a finished run"
    return "an unfinished run" if run.checkpoints() else "nothing"
