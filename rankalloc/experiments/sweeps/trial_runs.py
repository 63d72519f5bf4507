"""The runs behind a trial: the configuration of each, and its trace, trained, continued or found."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ...errors import AdapterFileError, ConfigError
from ...trace import RankTrace
from ..config import RunConfig
from ..run_folder import RunFolder
from ..runner import train
from .launching import train_in_processes
from .record import Sweep
from .space import configured, values_at


def trained(
    sweep: Sweep, run: RunConfig, place: RunFolder, params: dict[str, Any], stop: Callable[[], bool] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RankTrace:
    """The trace of a trial's run: as it lies in its folder, continued from a checkpoint there, or trained."""
    command, group, processes = _command(sweep, run, params), sweep.config.name, sweep.config.sweep.processes
    once: Callable[..., RankTrace] = functools.partial(
        train, run, place.path, prepared=sweep.prepared, splits=("tune",), command=command, stop=stop,
        callbacks=callbacks, group=group,
    )
    if processes > 1:
        once = functools.partial(
            train_in_processes, processes, run, place, command=command, stop=stop, group=group
        )
    return continued(run, place, once)


def continued(run: RunConfig, place: RunFolder, once: Callable[..., RankTrace]) -> RankTrace:
    """The trace of the run in a folder, which ``once(resume=...)`` trains where it does not lie there already."""
    same = place.config.is_file() and place.config.read_text(encoding="utf-8") == run.to_yaml()
    going_on = same and (place.trace.is_file() or bool(place.checkpoints()))
    if not going_on:
        place.discard()
    try:
        return once(resume=going_on)
    except (AdapterFileError, ConfigError):
        if not going_on:
            raise
    place.discard()  # no checkpoint in it was whole, or they are of other code
    return once(resume=False)


def run_of(
    config: RunConfig, attrs: Mapping[str, Any], slot: int, params: dict[str, Any], seed: int = 0
) -> RunConfig:
    """The configuration of a trial, or of the same with its ``seed``-th further seed; a matched control has its budget
    in parameters."""
    name = f"{config.name}-{slot}" + (f"-seed-{seed}" if seed else "")
    run = configured(config, params).replaced({"name": name, "seed": (config.seed + seed) % 2**32})
    if match := attrs.get("match_params"):
        others = {f"budget.{unit}": None for unit in ("ranks", "bytes", "fraction")}
        run = run.replaced({"budget.params": match, **others})
    return run


def _command(sweep: Sweep, run: RunConfig, params: dict[str, Any]) -> str:
    """The command that trains this one trial again."""
    found = values_at(sweep.config, params)
    if run.budget.params is not None and "budget" in params:  # a matched control
        found |= {"budget.fraction": None, "budget.params": run.budget.params}
    if run.seed != sweep.config.seed:
        found["seed"] = run.seed
    return train_command(sweep.folder.config, found, "--output", "again")


def train_command(config: Path, values: Mapping[str, Any], *flags: str) -> str:
    """The command that trains the run of a configuration with these values, by dotted key."""
    sets = [word for path, value in values.items() for word in ("--set", f"{path}={_as_yaml(value)}")]
    return shlex.join(["rankalloc", "train", config.as_posix(), *sets, *flags])


def _as_yaml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, dict, bool)) or value is None else str(value)
