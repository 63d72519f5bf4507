"""One trial of a sweep: its runs, what came out of them, and what did not fit into the memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import optuna
import torch
from transformers import TrainerCallback

from .goals import constraints, values
from .pruning import Rungs
from .publishing import publish_trial
from .record import Sweep
from .sharing import COLUMN, mean_over, measured
from .slots import of_slot, slot_of
from .trial_runs import run_of, trained

SPENT = "seconds before"
"""The attribute of a trial that holds what it took until it was put back."""
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
        watch = (Saved(trial), *(() if seed else (Rungs(sweep.config, sweep.prepared, trial),)))
        traces.append(trained(sweep, run, sweep.folder.trial(slot, seed), params, stop, watch))
    metrics = [trace.evaluations[0].metrics for trace in traces]
    found = [one[sweep.prepared.metric] for one in metrics]
    first = traces[0]
    attrs: dict[str, Any] = {
        "seconds": trial.user_attrs.get(SPENT, 0.0) + time.perf_counter() - before, "ranks": sum(first.final_ranks),
        "adapter_params": max(trace.adapter_params_final or 0 for trace in traces),
        "stored_bytes": max(trace.stored.bytes for trace in traces if trace.stored is not None),
        "step_seconds": first.step_seconds_after_freeze or first.step_seconds_before_freeze,
        "params_per_rank": min(layer.d_in + layer.d_out for layer in first.layers),
        "steps": sum(trace.steps_done for trace in traces), "values": found,
        "metrics": {name: statistics.fmean(one[name] for one in metrics) for name in metrics[0]},
    }  # fmt: skip
    value = statistics.fmean(found)
    if sweep.config.sweep.share_runs and not further:
        attrs[COLUMN] = measured(sweep, sweep.folder.trial(slot), first)
        value = mean_over(value, attrs[COLUMN])
    for name, content in attrs.items():
        trial.set_user_attr(name, content)
    if not further:
        publish_trial(sweep.folder, trial, first)
    for name, excess in constraints(sweep.config, attrs).items():
        trial.set_constraint(name, excess)
    return values(sweep.config, value, attrs)


class Saved(TrainerCallback):
    """Tells the study the step of every checkpoint."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trial.set_user_attr(SAVED, state.global_step)


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the device or of the host did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)
