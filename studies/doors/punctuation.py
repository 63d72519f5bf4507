"""Part "punctuation": one run on MiniLM-L6, by transformers' Trainer."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import transformers

import rankalloc as ra
from rankalloc.errors import RankallocError
from rankalloc.experiments.tasks.base import evaluate
from rankalloc.layers.targets import find_heads
from rankalloc.methods.planners.planning import layer_shapes

from ..common.part import SPLITS, Cell
from ..common.training import BATCH, short_punctuation, train
from .arms import DRIVEN, EQUAL, INITS, SCALING, peft_model

PEAK_RANK, MEAN_RANK, WARMUP = 8, 2, 10
BUDGET = {"warmup": 0.1, "freeze": 0.4, "every": 4}


def run(cell: Cell) -> dict[str, Any]:
    """Train and judge once. The driven arm is given to the Trainer as users do it: PEFT's model, and a callback that
    finds its adapters itself.

    Raises:
        RankallocError: training diverged.
    """
    transformers.logging.set_verbosity_error()
    task, split = short_punctuation(), SPLITS[cell.phase]
    transformers.set_seed(cell.seed)
    model, started = task.build_model(), time.process_time()
    shapes, heads = layer_shapes(model, 1), list(find_heads(model))
    budget = ra.RankBudget(params=MEAN_RANK * sum(shape.params_per_rank for shape in shapes), **BUDGET)
    rank = MEAN_RANK if cell.arm == EQUAL else PEAK_RANK
    torch.manual_seed(1000 + cell.seed)
    callbacks = []
    if cell.arm in INITS:
        adapters = ra.attach(model, rank=rank, alpha=SCALING * rank, init=INITS[cell.arm])
        callbacks = [ra.RankCallback(adapters, budget, save_trace=False)]
    else:
        model = peft_model(model, rank, SCALING * rank, [shape.name for shape in shapes], heads)
        callbacks = [ra.RankCallback(budget=budget, save_trace=False)] if cell.arm == DRIVEN else []
    peak = _trained(model, heads)
    train(model, task, cell.steps, cell.rate, cell.seed, WARMUP, callbacks)
    metrics = evaluate(task, model, split, BATCH).metrics
    if not math.isfinite(metrics["loss"]):
        raise RankallocError(f"training diverged: the loss is {metrics['loss']}")
    return {
        **metrics, "data": task.fingerprint, "peak_params": peak, "final_params": _trained(model, heads),
        "ranks": callbacks[0].adapters.ranks() if callbacks else None,
        "cpu_seconds": round(time.process_time() - started, 2),
    }  # fmt: skip


def _trained(model: torch.nn.Module, heads: list[str]) -> int:
    """Trained parameters apart from the heads', which are equal in all arms."""
    return sum(
        parameter.numel() for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(f".{head}." in f".{name}" for head in heads)
    )  # fmt: skip
