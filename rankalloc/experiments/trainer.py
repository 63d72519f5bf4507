"""transformers' Trainer, set up as a configuration says, and what it does at every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..adapters.adapter_set import Adapters
from ..errors import ConfigError
from ..training.callback import RankCallback
from ..training.checkpoints import checkpoints_in, require_whole
from .config import RunConfig
from .tasks.base import PreparedTask, evaluate

Progress = Callable[[int, int, dict[str, float]], None]


def trainer_for(
    config: RunConfig,
    model: Any,
    adapters: Adapters,
    prepared: PreparedTask,
    folder: Path,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """A Trainer that prints nothing: the callbacks report progress."""
    arguments = _arguments(config, folder)
    trainer = Trainer(
        model, arguments, train_dataset=prepared.splits["train"], data_collator=prepared.collator,
        callbacks=callbacks, optimizers=(_optimizer(config, adapters, arguments), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(config: RunConfig, folder: Path) -> TrainingArguments:
    training = config.training
    optional: dict[str, Any] = {"gradient_checkpointing": True} if training.gradient_checkpointing else {}
    if training.steps is not None:
        optional["max_steps"] = training.steps
    else:
        optional["num_train_epochs"] = training.epochs
    return TrainingArguments(
        output_dir=str(folder), **optional,
        per_device_train_batch_size=training.batch_size, learning_rate=training.learning_rate,
        weight_decay=training.weight_decay, lr_scheduler_type=training.scheduler, warmup_steps=training.warmup_steps,
        gradient_accumulation_steps=training.gradient_accumulation_steps, max_grad_norm=training.max_grad_norm,
        bf16=training.bf16,
        logging_steps=training.log_every, logging_first_step=True, eval_strategy="no",
        save_strategy="steps" if training.save_every else "no", save_steps=training.save_every or 500,
        save_total_limit=2, seed=config.seed, data_seed=config.seed, report_to=[], disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(), dataloader_pin_memory=False, remove_unused_columns=False,
    )


def _optimizer(config: RunConfig, adapters: Adapters, arguments: TrainingArguments) -> torch.optim.Optimizer | None:
    """The Trainer's kind of optimizer over LoRA+'s parameter groups; None (the Trainer's own groups) if all parameters
    share one learning rate and have no weight decay."""
    training = config.training
    if training.plus_ratio == 1 and not training.weight_decay:
        return None
    groups = adapters.parameter_groups(training.learning_rate, training.plus_ratio, training.weight_decay)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(groups, **options)


def last_checkpoint(folder: Path) -> str:
    """The checkpoint to resume from.

    Raises:
        ConfigError: there is none.
        AdapterFileError: it is not whole; the message names the file, and an earlier checkpoint that is.
    """
    found = checkpoints_in(folder)
    if not found:
        raise ConfigError(
            f"nothing to resume: {folder} holds no checkpoint; train with training.save_every=N to have them written"
        )
    require_whole(found[0])
    return str(found[0])


class Watch(TrainerCallback):
    """Reports every step to the caller, and evaluates on the tune split every ``training.eval_every`` steps."""

    def __init__(
        self, config: RunConfig, prepared: PreparedTask, ranking: RankCallback, progress: Progress | None
    ) -> None:
        self.config, self.prepared, self.ranking, self.progress = config, prepared, ranking, progress
        self.newest: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.ranking.past_the_end:
            return
        controller, every = self.ranking.controller, self.config.training.eval_every
        assert controller is not None  # made when training began
        if every and state.global_step % every == 0:
            record = evaluate(self.prepared, model, "tune", self.config.training.eval_batch_size)
            controller.log(state.global_step, {f"tune_{k}": v for k, v in record.metrics.items()})
            self.newest |= {f"tune_{k}": v for k, v in record.metrics.items()}
        if self.progress is not None:
            ranks = sum(controller.trace.final_ranks)
            self.progress(state.global_step, state.max_steps, {**self.newest, "ranks": ranks})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.newest |= {k: v for k, v in (logs or {}).items() if k == "loss"}
