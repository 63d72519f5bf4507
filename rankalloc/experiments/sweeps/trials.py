"""One trial of a sweep: its runs, what came out of them, and what did not fit into the memory."""

from __future__ import annotations

import functools
import json
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
import torch
from transformers import TrainerCallback

from ...errors import AdapterFileError, ConfigError
from ...trace import RankTrace
from ..config import RunConfig
from ..run_folder import RunFolder
from ..runner import train
from .goals import constraints, values
from .pruning import Rungs
from .publishing import publish_trial
from .record import Sweep
from .slots import of_slot, slot_of
from .space import configured, values_at

SAVED = "saved"
"""The attribute of a trial that holds the step of its last checkpoint."""


def objectives_of(
    sweep: Sweep, trial: optuna.Trial, params: dict[str, Any], stop: Callable[[], bool]
) -> list[float]:
    """Train one trial, or go on with it: with each of its seeds, or with the one further seed that the slot is for. Its
    quality is the mean of the task's metric on the tune split.

    Raises:
        optuna.TrialPruned: it was stopped early.
    """
    (slot, further), before = of_slot(slot_of(trial)), time.perf_counter()
    traces = []
    for seed in [further] if further else range(sweep.config.sweep.seeds):
        run = run_of(sweep.config, trial.user_attrs, slot, params, seed)
        watch = (_Saved(trial), *(() if seed else (Rungs(sweep.config, sweep.prepared, trial),)))
        traces.append(trained(sweep, run, sweep.folder.trial(slot, seed), params, stop, watch))
    metrics = [trace.evaluations[0].metrics for trace in traces]
    found = [one[sweep.prepared.metric] for one in metrics]
    first = traces[0]
    attrs: dict[str, Any] = {
        "seconds": time.perf_counter() - before, "ranks": sum(first.final_ranks),
        "adapter_params": max(trace.adapter_params_final or 0 for trace in traces),
        "stored_bytes": max(trace.stored.bytes for trace in traces if trace.stored is not None),
        "step_seconds": first.step_seconds_after_freeze or first.step_seconds_before_freeze,
        "params_per_rank": min(layer.d_in + layer.d_out for layer in first.layers),
        "steps": sum(trace.steps_done for trace in traces), "values": found,
        "metrics": {name: statistics.fmean(one[name] for one in metrics) for name in metrics[0]},
    }  # fmt: skip
    for name, value in attrs.items():
        trial.set_user_attr(name, value)
    if not further:
        publish_trial(sweep.folder, trial, first)
    for name, excess in constraints(sweep.config, attrs).items():
        trial.set_constraint(name, excess)
    return values(sweep.config, statistics.fmean(found), attrs)


class _Saved(TrainerCallback):
    """Tells the study the step of every checkpoint."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trial.set_user_attr(SAVED, state.global_step)


def trained(
    sweep: Sweep, run: RunConfig, place: RunFolder, params: dict[str, Any], stop: Callable[[], bool] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RankTrace:
    """The trace of a trial's run: as it lies in its folder, continued from a checkpoint there, or trained."""
    same = place.config.is_file() and place.config.read_text(encoding="utf-8") == run.to_yaml()
    going_on = same and (place.trace.is_file() or bool(place.checkpoints()))
    if not going_on:
        place.discard()
    once = functools.partial(
        train, run, place.path, prepared=sweep.prepared, splits=("tune",), command=_command(sweep, run, params),
        stop=stop, callbacks=callbacks, group=sweep.config.name,
    )
    try:
        return once(resume=going_on)
    except (AdapterFileError, ConfigError):
        if not going_on:
            raise
    place.discard()  # no checkpoint in it was whole, or they are of other code
    return once()


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


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the device or of the host did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _command(sweep: Sweep, run: RunConfig, params: dict[str, Any]) -> str:
    """The command that trains this one trial again."""
    found = values_at(sweep.config, params)
    if run.budget.params is not None and "budget" in params:  # a matched control
        found |= {"budget.fraction": None, "budget.params": run.budget.params}
    if run.seed != sweep.config.seed:
        found["seed"] = run.seed
    sets = [word for path, value in found.items() for word in ("--set", f"{path}={_as_yaml(value)}")]
    return shlex.join(["rankalloc", "train", sweep.folder.config.as_posix(), *sets, "--output", "again"])


def _as_yaml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, dict, bool)) or value is None else str(value)
