"""Plain training with transformers' Trainer, and the short punctuation task that several studies train on."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence

from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import rankalloc as ra
from rankalloc.experiments.tasks.base import PreparedTask

BATCH = 16
SHORT_PUNCTUATION = {"limit_tune": 200, "max_length": 32, "prior_bias": True}
"""Data settings: windows of at most 32 tokens; the classifier's bias starts at the classes' log frequencies. Without
that bias, some seeds of any arm stay in the state in which every word has the most frequent class."""


@functools.cache
def short_punctuation() -> PreparedTask:
    """Punctuation with :data:`SHORT_PUNCTUATION`, prepared once in each process."""
    return ra.load_task("punctuation", data=SHORT_PUNCTUATION)


def train(
    model: nn.Module, task: PreparedTask, steps: int, rate: float, seed: int, warmup: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:  # fmt: skip
    """Train in place and in silence: AdamW on the CPU, clipping at norm 1, and a rate that rises for ``warmup`` steps
    and then falls linearly to zero. Nothing is saved."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate, warmup_steps=warmup,
            lr_scheduler_type="linear", seed=seed, data_seed=seed, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False, logging_steps=steps,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=task.splits["train"], data_collator=task.collator,
            callbacks=list(callbacks),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
