"""The Trainer of a run as its configuration says: transformers' own, or TRL's for conversations and preferences.

TRL's SFTTrainer gets tokens and labels, so that what is learnt is what the task says. Its DPOTrainer gets the data's
own columns; its reference is the base, whose log-probabilities are computed beforehand while ΔW is still zero, so that
no second copy of the base is held.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..adapters.adapter_set import Adapters
from ..errors import ConfigError, RankallocError
from ..layers.replicas import DATA_PARALLEL
from ..methods.planners.planning import first_batches
from ..training.callback import RankCallback
from ..training.checkpoints import checkpoints_in, fault_of, require_whole
from .config import RunConfig
from .file_task import FileTask
from .launched import together
from .plain_trainer import PlainTrainer
from .tasks.base import PreparedTask, evaluate

Progress = Callable[[int, int, dict[str, float]], None]

# transformers' name for recomputing activations, which is changing
_CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
_SHARED_NAME = "preferences"  # in a run's folder while several processes train on them


@contextlib.contextmanager
def trainer_for(
    config: RunConfig,
    model: Any,
    adapters: Adapters | None,
    prepared: PreparedTask,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> Iterator[Trainer]:
    """A Trainer that prints nothing: the callbacks report progress. What it wrote for itself is gone afterwards.
    Without adapters of ours the optimizer is the Trainer's own."""
    options: dict[str, Any] = {
        "args": arguments, "callbacks": callbacks, "optimizers": (_optimizer(config, adapters, arguments), None),
    }
    if prepared.trainer != "dpo":
        options["data_collator"] = prepared.collator
    trainer: Any
    with _train_split(prepared, arguments) as data:
        if prepared.trainer == "plain":
            example = next(first_batches(data, prepared.collator, arguments.per_device_train_batch_size))
            trainer = PlainTrainer(model, train_dataset=data, example=example, **options)
        else:
            trl = _trl(prepared)
            kind = trl.SFTTrainer if prepared.trainer == "sft" else trl.DPOTrainer
            with _no_bars():
                trainer = kind(model, train_dataset=data, processing_class=prepared.tokenizer, **options)
            trainer.create_model_card = _no_card
        trainer.remove_callback(PrinterCallback)
        yield trainer


def _no_card(*given: Any, **named: Any) -> None:
    """In place of the model card that TRL leaves beside every checkpoint: the run's own trace says more."""


def arguments_for(config: RunConfig, prepared: PreparedTask, folder: Path) -> TrainingArguments:
    """The Trainer's arguments; they join the processes of a launcher, and write nothing.

    Raises:
        ConfigError: TRL is needed and not installed.
        RankallocError: one process would spread the model over several GPUs.
    """
    training = config.training
    optional: dict[str, Any] = {_CHECKPOINTING: True} if training.gradient_checkpointing else {}
    if training.steps is not None:
        optional["max_steps"] = training.steps
    else:
        optional["num_train_epochs"] = training.epochs
    kind, own = _kind_of_arguments(config, prepared)
    arguments = kind(
        output_dir=str(folder), **{**own, **optional},
        per_device_train_batch_size=training.batch_size, learning_rate=training.learning_rate,
        weight_decay=training.weight_decay, lr_scheduler_type=training.scheduler, warmup_steps=training.warmup_steps,
        gradient_accumulation_steps=training.gradient_accumulation_steps, max_grad_norm=training.max_grad_norm,
        bf16=training.bf16,
        logging_steps=training.log_every, logging_first_step=True, eval_strategy="no",
        save_strategy="steps" if training.save_every else "no", save_steps=training.save_every or 500,
        save_total_limit=2, seed=config.seed, data_seed=config.seed, report_to=_integration(config), disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(), dataloader_pin_memory=False, remove_unused_columns=False,
    )
    if arguments.n_gpu > 1:
        raise RankallocError(DATA_PARALLEL)
    return arguments


def _integration(config: RunConfig) -> list[str]:
    """What the Trainer itself reports to."""
    name = config.tracking
    if name not in _INTEGRATIONS:
        return []
    if not any(find_spec(package) for package in _INTEGRATIONS[name]):
        raise ConfigError(f"tracking {name!r} needs a package that is not installed: pip install {name}")
    return [name]


_INTEGRATIONS = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",)}
"""{tracking that is the Trainer's own: the packages of which it needs one}."""


def _kind_of_arguments(config: RunConfig, prepared: PreparedTask) -> tuple[Any, dict[str, Any]]:
    """The class of the arguments that the task's trainer takes, and those that only it knows."""
    if prepared.trainer == "plain":
        return TrainingArguments, {}
    trl = _trl(prepared)
    if prepared.trainer == "sft":
        # the features are cut and labelled; their collator pads them
        return trl.SFTConfig, {
            _CHECKPOINTING: False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True},
        }
    assert isinstance(config.task, FileTask)  # no named task has preferences
    return trl.DPOConfig, {
        _CHECKPOINTING: False, "beta": config.task.beta, "max_length": config.data.max_length,
        "precompute_ref_log_probs": True,
    }


def _trl(prepared: PreparedTask) -> Any:
    if find_spec("trl") is None:
        raise ConfigError(f'a task of kind {prepared.kind!r} is trained by TRL: pip install "rankalloc[trl]"')
    return import_module("trl")


@contextlib.contextmanager
def _train_split(prepared: PreparedTask, arguments: TrainingArguments) -> Iterator[Any]:
    """The train split as the task's trainer takes it.

    DPOTrainer hands the reference from the first process to the others in a file beside the data set's own, so
    that a data set in memory needs one.
    """
    if prepared.trainer == "plain":
        yield prepared.splits["train"]
        return
    from datasets import Dataset, IterableDataset, load_from_disk

    if prepared.trainer == "sft":
        data = prepared.splits["train"]
        yield data if isinstance(data, (Dataset, IterableDataset)) else Dataset.from_list(list(data))
        return
    data = prepared.rows["train"]
    if arguments.world_size == 1:
        yield data
        return
    folder, first = Path(str(arguments.output_dir)) / _SHARED_NAME, arguments.process_index == 0
    try:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            with _no_bars():
                data.save_to_disk(str(folder))
        together(arguments)
        yield load_from_disk(str(folder))
    finally:
        if first:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of datasets and of TRL's preparation."""
    import datasets

    shown, before = datasets.are_progress_bars_disabled(), os.environ.get("TQDM_DISABLE")
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def require_length(config: RunConfig, prepared: PreparedTask) -> None:
    """Raise ConfigError when the train split is streamed, so that an epoch has no length, and no steps are given."""
    if prepared.streaming and config.training.steps is None:
        raise ConfigError(
            f"training.epochs {config.training.epochs:g} of a train set that is streamed has no known length; give "
            "training.steps"
        )


def require_trainable(prepared: PreparedTask, model: Any, adapters: Adapters) -> None:
    """What TRL's trainers would take no notice of, or take for something else.

    Raises:
        ConfigError: the output layer is adapted, which they read past; or the adapter does not begin at ΔW = 0, so
            that DPO would compare with something else than the base.
    """
    if prepared.trainer == "plain":
        return
    output = model.get_output_embeddings()
    adapted = [name for name, adapter in adapters.modules.items() if model.get_submodule(name) is output]
    if adapted:
        raise ConfigError(
            f"{adapted[0]} is the output layer, whose weight TRL reads without an adapter: it would never be trained; "
            "leave it out of adapter.target_modules, or train it whole with adapter.modules_to_save"
        )
    if prepared.trainer == "dpo":
        moved = [name for name, adapter in adapters.modules.items() if _begins_moved(adapter)]
        if moved:
            raise ConfigError(
                f"DPO compares with the base, and the adapter of {moved[0]} begins with an update of its own; choose a "
                "method that begins at the base, such as auto"
            )


@torch.no_grad()
def _begins_moved(adapter: Any) -> bool:
    return bool(adapter.delta_weight().any())


def _optimizer(
    config: RunConfig, adapters: Adapters | None, arguments: TrainingArguments
) -> torch.optim.Optimizer | None:
    """The Trainer's kind of optimizer over LoRA+'s parameter groups; None (the Trainer's own groups) if all parameters
    share one learning rate and have no weight decay."""
    training = config.training
    if adapters is None or (training.plus_ratio == 1 and not training.weight_decay):
        return None
    groups = adapters.parameter_groups(training.learning_rate, training.plus_ratio, training.weight_decay)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(groups, **options)


def last_checkpoint(folder: Path) -> tuple[Path, dict[Path, str]]:
    """The latest checkpoint from which the run goes on as it was, and the later ones that are not whole, with what is
    wrong: the process may have been killed while it wrote them.

    Raises:
        ConfigError: there is no checkpoint.
        AdapterFileError: none is whole; the message names the file that the latest one lacks.
    """
    found = checkpoints_in(folder)
    if not found:
        raise ConfigError(
            f"nothing to resume: {folder} holds no checkpoint; train with training.save_every=N to have them written"
        )
    broken: dict[Path, str] = {}
    for path in found:
        fault = fault_of(path)
        if fault is None:
            return path, broken
        broken[path] = fault
    require_whole(found[0])
    raise AssertionError("unreachable: it is not whole")


class Watch(TrainerCallback):
    """Reports every step to the caller, and evaluates on the tune split every ``training.eval_every`` steps.

    The loss is known after the callbacks of its step, so a step that logs one is reported then; between two logs the
    loss is told with the step it is of.
    """

    def __init__(
        self, config: RunConfig, prepared: PreparedTask, ranking: RankCallback, progress: Progress | None
    ) -> None:
        self.config, self.prepared, self.ranking, self.progress = config, prepared, ranking, progress
        self.newest: dict[str, float] = {}
        self._loss: tuple[int, float] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.ranking.past_the_end:
            return
        controller, every = self.ranking.controller, self.config.training.eval_every
        assert controller is not None  # made when training began
        if every and state.global_step % every == 0:
            record = evaluate(self.prepared, model, "tune", self.config.training.eval_batch_size)
            controller.log(state.global_step, {f"tune_{k}": v for k, v in record.metrics.items()})
            self.newest |= {f"tune_{k}": v for k, v in record.metrics.items()}
        if not control.should_log:
            self._report(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}):
            return
        assert logs is not None
        self._loss = (state.global_step, logs["loss"])
        self._report(state)
        if state.global_step == 1:
            together(args)  # the first process may have made room for this run's checkpoints

    def _report(self, state: Any) -> None:
        if self.progress is None or self.ranking.controller is None:
            return
        step, values = state.global_step, dict(self.newest)
        if self._loss is not None:
            of, loss = self._loss
            values["loss" if of == step else f"loss at step {of}"] = loss
        values["ranks"] = sum(self.ranking.controller.trace.final_ranks)
        self.progress(step, state.max_steps, values)
