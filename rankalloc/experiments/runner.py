"""One run from a configuration: prepare, attach, train under the budget, evaluate, save."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from ..adapters.adapter_set import Adapters
from ..budget import BudgetPlan, LayerShape, RankBudget, budget_of
from ..errors import ConfigError, RankallocError, unknown
from ..files import write_text
from ..methods import find_method
from ..methods.planners.planning import at_peak, first_batches, layer_shapes, plan_ranks
from ..storage.bottleneck_folder import ADAPTER_FILES
from ..storage.loading import load
from ..storage.model_saving import attach
from ..storage.readers import layout_for
from ..storage.saving import most_stored, require_reader, save, stored_of
from ..trace import EvaluationRecord, RankTrace, StoredRecord
from ..training.callback import RankCallback
from ..training.checkpoints import STATE_NAME, read_state
from ..training.checks import hasty
from ..training.processes import check_agreement
from ..training.resuming import began_with
from .config import RunConfig
from .launched import processes, processes_note, together
from .preemption import StopCallback
from .run_folder import RunFolder
from .tasks import prepare
from .tasks.base import PreparedTask, base_of, evaluate
from .tracking import trackers
from .trainer import (
    Progress,
    Watch,
    arguments_for,
    last_checkpoint,
    require_length,
    require_trainable,
    trainer_for,
)

# Arguments of RankCallback and RankController that only the runner may give.
_RESERVED = ("adapters", "budget", "method", "total_steps", "fresh", "resume_from", "loss_fn", "save_trace")


def train(
    config: RunConfig,
    folder: Path,
    *,
    prepared: PreparedTask | None = None,
    splits: Sequence[str] = ("tune", "report"),
    command: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    group: str | None = None,
) -> RankTrace:
    """Train one run into ``folder``; :mod:`rankalloc.experiments.run_folder` lists the files.

    Under torchrun or ``accelerate launch`` every process calls it: all train and evaluate alike, and the first one
    alone writes, tracks and reports progress.

    The trace is written once, last: a run that fails, or whose process is killed, before its evaluations and its
    adapter are complete leaves no trace, and can be resumed from its last checkpoint.

    Args:
        prepared: the task, when the caller has it already.
        splits: evaluated at the end; leave "report" out if the result decides between runs.
        command: recorded in the trace as the command that reproduces the run.
        resume: continue from the last checkpoint in ``folder`` that is whole (``training.save_every`` writes them);
            later ones, which a killed process left unfinished, are removed. A run that has finished stays as it is,
            and its trace is returned.
        progress: called after every step with (step, total steps, newest values), in the first process.
        stop: asked after every step; where it says so, a checkpoint is written, and the run ends.
        callbacks: further callbacks of the Trainer; an exception of theirs ends the run, and is raised.
        group: the sweep that this run is a trial of, by which wandb groups.

    Raises:
        Preempted: ``stop`` ended it.
        RankallocError: the configuration, the data or the run is at fault; the message is one sentence.
    """
    if resume and (done := finished(config, folder)) is not None:
        return done
    prepared = prepared or prepare(config)
    require_length(config, prepared)
    arguments = arguments_for(config, prepared, folder)
    run, first = RunFolder(folder), arguments.process_index == 0
    checkpoint, broken = last_checkpoint(folder) if resume else (None, {})
    set_seed(config.seed)
    model = base_of(prepared)
    begun = None if checkpoint is None else _begun_with(config, model, checkpoint)
    adapters, budget = attach_for(config, model, prepared, begun)
    require_trainable(prepared, model, adapters)
    layout = layout_for(None, reader=config.reader)
    require_reader(adapters, layout)
    ranking = RankCallback(adapters, budget, config.method, save_trace=False, **_options(config))
    together(arguments)  # what a process refuses is refused before the first one writes
    if first:
        write_text(run.config, config.to_yaml())  # only once everything that can be refused has been checked
        for path in broken:  # the run comes to their steps again, and what writes them there expects no files
            shutil.rmtree(path)
    tracking = trackers(config, folder, ranking, group) if first else []
    watching = [ranking, Watch(config, prepared, ranking, progress if first else None), *tracking, *callbacks]
    if stop is not None:
        watching.append(StopCallback(stop))
    with contextlib.ExitStack() as ending, trainer_for(
        config, model, adapters, prepared, arguments, watching
    ) as trainer:
        for tracker in tracking:
            ending.callback(tracker.close, failed=True)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        ending.pop_all()

    trace = ranking.trace
    check_agreement(adapters, trace.steps_done)
    _describe(trace, config, prepared, command)
    trace.stored = StoredRecord(**asdict(stored_of(adapters, layout)))
    trace.notes += [
        f"{path.name} was not whole, as {fault}: the run went on from {checkpoint.name}, before it"
        for path, fault in broken.items() if checkpoint is not None
    ]
    trace.notes += [*processes_note(config, arguments, prepared.train_examples), *_sizes_note(config, adapters)]
    trace.evaluations += [_evaluated(config, prepared, model, split) for split in splits]
    if first:
        run.trace.unlink(missing_ok=True)  # an earlier run's trace would mark an incomplete adapter as finished
        save(adapters, run.adapter, reader=config.reader)
        trace.save(run.trace)
        for tracker in tracking:
            tracker.finish(trace)
            if tracker.trouble:
                trace.save(run.trace)
    together(arguments)
    return trace


def finished(config: RunConfig, folder: Path) -> RankTrace | None:
    """The trace of the run in ``folder`` when it is complete and as long as ``config`` asks; None otherwise.

    A run that is to be longer, or shorter, than it was is not finished: it is resumed, where its checkpoints allow.
    """
    run = RunFolder(folder)
    if not (run.trace.is_file() and any(all((run.adapter / n).is_file() for n in pair) for pair in ADAPTER_FILES)):
        return None
    trace = RankTrace.load(run.trace)
    then, now = trace.config.get("training", {}), config.training.model_dump(mode="json")
    same_length = all(then.get(name) == now[name] for name in ("steps", "epochs"))
    return trace if trace.finished and same_length else None


def _sizes_note(config: RunConfig, adapters: Adapters) -> list[str]:
    """How the parameters of what is no LoRA were counted."""
    return [] if find_method(config.method).lora or adapters.plan is None else adapters.plan.notes


def _options(config: RunConfig) -> dict[str, Any]:
    """The options that the configuration passes to the controller."""
    for name in config.method_options:
        if name in _RESERVED:
            known = find_method(config.method).options or ["none"]
            raise ConfigError(unknown(f"option of method {config.method!r}:", name, known))
    return {**config.method_options, **config.training.away}


def _describe(trace: RankTrace, config: RunConfig, prepared: PreparedTask, command: str | None) -> None:
    """Record in the trace where the run came from, which the controller does not know."""
    trace.name, trace.model, trace.command = config.name, prepared.model_name, command
    trace.config, trace.data_fingerprint = config.model_dump(mode="json"), prepared.fingerprint
    trace.notes += [note for note in prepared.notes if note not in trace.notes]


def _evaluated(config: RunConfig, prepared: PreparedTask, model: torch.nn.Module, split: str) -> EvaluationRecord:
    """Quality on one split; RankallocError when the loss is not finite."""
    record = evaluate(prepared, model, split, config.training.eval_batch_size)
    if not math.isfinite(record.metrics["loss"]):
        raise RankallocError(
            f"training diverged: the {split} loss is {record.metrics['loss']}; lower the learning rate (now "
            f"{config.training.learning_rate:g}) or set training.max_grad_norm"
        )
    return record


def evaluate_saved(
    config: RunConfig, prepared: PreparedTask, adapter: Path, split: str, blocks: int = 0
) -> EvaluationRecord:
    """Quality of an adapter on disk on one split, on a fresh model."""
    set_seed(config.seed)
    model = base_of(prepared)
    load(model, adapter)
    return evaluate(prepared, model, split, config.training.eval_batch_size, blocks)


def attach_for(
    config: RunConfig, model: Any, prepared: PreparedTask, begun: RankBudget | None = None
) -> tuple[Adapters, RankBudget]:
    """Attach the adapters that the configuration's method starts with; returns them and their budget.

    A method that chooses ranks before training starts at its final ranks, in its own parametrisation; it may use
    the first batches of the train split. ``begun`` is the budget of a run that is resumed: a method that uses data
    stays at its peak ranks then, since a checkpoint brings the final ones.
    """
    method = find_method(config.method)
    if not method.lora and config.reader is not None:
        raise ConfigError(
            f"reader {config.reader!r} reads LoRA, and method {config.method!r} trains none; leave reader out"
        )
    budget = begun or budget_from(config)
    rank, targets = config.adapter.rank, targets_of(config)
    adapter = config.adapter
    common: dict[str, Any] = {
        "rank": rank, "alpha": adapter.alpha, "scale": adapter.scale, "dropout": adapter.dropout,
        "init": adapter.init or method.init,
    }
    if method.when == "during":
        return attach(model, **common, **targets), budget
    if method.planner is not None and begun is not None:
        peaks = {s.name: at_peak(s).rank for s in layer_shapes(model, rank, **targets)}
        return attach(model, **common, ranks=peaks, **targets), budget
    batches = first_batches(prepared.splits["train"], prepared.collator, config.training.batch_size)
    options = {name: value for name, value in config.method_options.items() if name in method.options}
    seed = config.method_options.get("seed", config.seed)
    ranks = plan_ranks(model, batches, budget, config.method, rank=rank, seed=seed, **targets, **options)
    adapters = attach(model, **common, ranks=ranks, **targets)
    return adapters, budget_of(adapters.shapes(), budget) if method.lora else budget


def _begun_with(config: RunConfig, model: Any, checkpoint: Path) -> RankBudget:
    """The budget of the run that this checkpoint is of: what a fraction is a share of has changed."""
    shapes = layer_shapes(model, config.adapter.rank, **targets_of(config))
    if find_method(config.method).when == "before":
        shapes = [at_peak(shape, config.budget.multiple_of) for shape in shapes]
    return began_with(budget_from(config), read_state(checkpoint / STATE_NAME), sum(shape.rank for shape in shapes))


def budget_from(config: RunConfig) -> RankBudget:
    """The configured budget."""
    return RankBudget(**config.budget.model_dump())


@dataclass(frozen=True)
class Preview:
    """What a run would do: the layers it would adapt (``rank`` is their first rank), heads with their parameters,
    the budget's plan, optimizer steps, examples by split (None: streamed), adapter parameters at the start and, where
    the budget says, the most there can be at the end, the numbers that train at the start, the most numbers that can be
    in the file, what is to be said of the data and the model, and what should make one wary."""

    layers: list[LayerShape]
    heads: dict[str, int]
    plan: BudgetPlan
    total_steps: int
    examples: dict[str, int | None]
    model: str
    params_initial: int
    params_final: int | None
    trained: int
    stored: int
    notes: list[str]
    alerts: list[str]


def preview(config: RunConfig) -> Preview:
    """Everything :func:`train` would check and choose before its first step; writes nothing."""
    prepared = prepare(config)
    require_length(config, prepared)
    arguments_for(config, prepared, config.folder)
    set_seed(config.seed)
    model = prepared.build_model()
    shapes = layer_shapes(model, config.adapter.rank, **targets_of(config))
    total_steps = steps_of(config, prepared.train_examples or 0)
    if find_method(config.method).when == "before":
        shapes = [at_peak(shape, config.budget.multiple_of) for shape in shapes]
    adapters, budget = attach_for(config, model, prepared)
    require_trainable(prepared, model, adapters)
    layout = layout_for(None, reader=config.reader)
    require_reader(adapters, layout)
    if find_method(config.method).lora:  # a rank pattern may exceed the peak
        shapes = [replace(s, rank=max(s.rank, a.rank)) for s, a in zip(shapes, adapters, strict=True)]
    plan = budget_from(config).resolve(shapes, total_steps)
    RankCallback(adapters, budget, config.method, **_options(config))  # refuses what train would
    if find_method(config.method).when == "before":
        final: int | None = adapters.num_params()
        stored = stored_of(adapters, layout).numbers
    else:
        final = {"params": plan.target, "bytes": plan.target // 4}.get(plan.unit)
        stored = most_stored(adapters, plan, layout)
    return Preview(
        layers=adapters.shapes(), heads=adapters.head_params(), plan=plan, total_steps=total_steps,
        examples={s: prepared.train_examples if s == "train" else len(rows) for s, rows in prepared.splits.items()},
        model=prepared.model_name,
        params_initial=adapters.num_params(), params_final=final, trained=adapters.trainable_params(), stored=stored,
        notes=[*prepared.notes, *_sizes_note(config, adapters)], alerts=hasty(plan, find_method(config.method)),
    )


def steps_of(config: RunConfig, examples: int) -> int:
    """Optimizer steps of the run, from ``training.steps`` or ``training.epochs``; several processes share an epoch."""
    training = config.training
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None, "a configuration has steps or epochs"
    batches = math.ceil(examples / (training.batch_size * processes()))
    return math.ceil(training.epochs * max(1, math.ceil(batches / training.gradient_accumulation_steps)))


def targets_of(config: RunConfig) -> dict[str, Any]:
    """The arguments of attach that say which layers are adapted."""
    adapter = config.adapter
    return {
        "target_modules": adapter.target_modules, "exclude_modules": adapter.exclude_modules or (),
        "modules_to_save": adapter.modules_to_save,
    }
