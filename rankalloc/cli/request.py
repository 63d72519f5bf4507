"""A ``train`` or ``sweep`` command as it was given."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..experiments.config import RunConfig


def settings_of(
    model: str | None, data: str | None, kind: str | None, text: str | None, label: str | None
) -> list[str]:
    """The overrides that --model, --data and the columns stand for; the run has the data's name.

    Raises:
        ConfigError: what says something of the data is given without them.
    """
    about_data = {"kind": kind, "text": text, "label": label}
    if data is None:
        flags = {"kind": "--kind", "text": "--text-column", "label": "--label-column"}
        lonely = [flags[name] for name, value in about_data.items() if value is not None]
        if lonely:
            raise ConfigError(f"{lonely[0]} says what is in --data; give that, too")
    settings = [] if model is None else [f"model={json.dumps(model)}"]
    if data is not None:
        about_data["kind"] = kind or "text-classification"
        task = {"train": data, **{name: value for name, value in about_data.items() if value is not None}}
        stem = re.sub(r"[^\w-]+", "-", Path(data.partition("[")[0]).stem).strip("-") or "data"
        settings += [f"task={json.dumps(task)}", f"name={json.dumps(f'{stem}-sweep')}"]
    return settings


@dataclass(frozen=True)
class Request:
    """The command's name, arguments and options."""

    command: str
    path: str | None
    overrides: list[str]
    output: str | None
    dry_run: bool = False
    as_json: bool = False
    trials: int | None = None
    storage: str | None = None
    jobs: int = 1

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
        """The command line that repeats this request.

        Args:
            flags: appended.
            whole: False keeps only what decides the result, for records that are passed on (a storage URL may hold
                a password).
        """
        words = ["rankalloc", self.command, *([self.path] if self.path is not None else [])]
        for override in self.overrides:
            words += ["--set", override]
        if self.trials is not None:
            words += ["--trials", str(self.trials)]
        if whole:
            if self.storage is not None:
                words += ["--storage", self.storage]
            if self.jobs != 1:
                words += ["--jobs", str(self.jobs)]
            if self.output is not None:
                words += ["--output", self.output]
            words += ["--json"] if self.as_json else []
        return shlex.join([*words, *flags])
