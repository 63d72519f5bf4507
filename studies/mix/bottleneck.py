"""Part "bottleneck": one run on MiniLM-L6 of bottlenecks or of LoRA, at equal parameters, by transformers' Trainer."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import transformers

import rankalloc as ra
from rankalloc.errors import RankallocError
from rankalloc.experiments.tasks.base import evaluate
from rankalloc.methods.planners.planning import layer_shapes

from ..common.grid import Grid
from ..common.part import SPLITS, Cell, Part, loss
from ..common.training import BATCH, short_punctuation, train

PEAK_RANK, MEAN_RANK, WARMUP = 8, 2, 10
BUDGET = {"warmup": 0.1, "freeze": 0.4, "every": 4}
ARMS: dict[str, dict[str, Any]] = {
    "uniform": {}, "auto": {}, "bottleneck": {}, "bottleneck, pfeiffer": {"after": "pfeiffer"},
}
"""{arm: options of its plan}; an arm's method is its name up to the comma."""


def run(cell: Cell) -> dict[str, Any]:
    """Train and judge once.

    Raises:
        RankallocError: training diverged.
    """
    transformers.logging.set_verbosity_error()
    task, split = short_punctuation(), SPLITS[cell.phase]
    transformers.set_seed(cell.seed)
    model, started, method = task.build_model(), time.process_time(), cell.arm.split(",")[0]
    params = MEAN_RANK * sum(shape.params_per_rank for shape in layer_shapes(model, 1))
    budget = ra.RankBudget(params=params, **BUDGET)
    torch.manual_seed(1000 + cell.seed)
    if method == "auto":
        adapters = ra.attach(model, rank=PEAK_RANK, alpha=2 * PEAK_RANK)
    else:
        plan = ra.plan_ranks(model, None, budget, method, rank=MEAN_RANK, **ARMS[cell.arm])
        adapters = ra.attach(model, alpha=2 * MEAN_RANK, ranks=plan)
    callback = ra.RankCallback(adapters, budget, method, save_trace=False)
    train(model, task, cell.steps, cell.rate, cell.seed, WARMUP, [callback])
    metrics = evaluate(task, model, split, BATCH).metrics
    if not math.isfinite(metrics["loss"]):
        raise RankallocError(f"training diverged: the loss is {metrics['loss']}")
    return {
        **metrics, "data": task.fingerprint, "params": adapters.num_params(), "allowed": params,
        "cpu_seconds": round(time.process_time() - started, 2),
    }  # fmt: skip


PART = Part(
    "bottleneck", tuple(ARMS), ("punctuation",), Grid((2e-3, 4e-3, 8e-3)), 96, rate_seeds=1, seeds=6,
    first_seed=100, run=run, value=loss, criterion=loss,
)  # fmt: skip
