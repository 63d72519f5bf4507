"""One run: TRL's SFTTrainer on the chat rows, then a judgement on held-out words."""

from __future__ import annotations

import math
import tempfile
import time
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from rankalloc.errors import RankallocError

from ..common.part import SPLITS, Cell
from . import task
from .arms import adapted

BATCH, WARMUP, MAX_LENGTH = 4, 8, 64


def run(cell: Cell) -> dict[str, Any]:
    """Train and judge once.

    AdamW, a rate that rises for eight steps and falls linearly to zero, gradients clipped at norm 1; the loss is on the
    answers alone.

    Raises:
        RankallocError: training diverged.
    """
    transformers.logging.set_verbosity_error()
    started = time.process_time()
    model, tokenizer = task.model_and_tokenizer()
    transformers.set_seed(1000 + cell.seed)
    model, callbacks = adapted(cell, model)
    peak = _trained(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, max_steps=cell.steps, per_device_train_batch_size=BATCH, learning_rate=cell.rate,
            warmup_steps=WARMUP, lr_scheduler_type="linear", seed=cell.seed, data_seed=cell.seed, report_to=[],
            save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, dataloader_pin_memory=False,
            logging_steps=cell.steps, gradient_checkpointing=False, max_length=MAX_LENGTH, completion_only_loss=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model, arguments, train_dataset=Dataset.from_list(task.rows()["train"]), processing_class=tokenizer,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    found = task.judge(trainer.model, tokenizer, SPLITS[cell.phase])
    if not math.isfinite(found["loss"]):
        raise RankallocError(f"training diverged: the loss is {found['loss']}")
    return {
        **found, "data": task.fingerprint(), "peak_params": peak, "final_params": _trained(model),
        "ranks": callbacks[0].adapters.ranks() if callbacks else None,
        "cpu_seconds": round(time.process_time() - started, 2),
    }  # fmt: skip


def untrained(split: str) -> dict[str, float]:
    """How the model does before it has learned anything."""
    return task.judge(*task.model_and_tokenizer(), split)


def _trained(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
