"""One training run, DyLoRA or LoRA, evaluated at every rank it can serve."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from transformers import set_seed

import rankalloc as ra
from rankalloc.experiments.tasks.base import evaluate

from ..common.training import BATCH, short_punctuation, train

ALPHA, SCALE = 4.0, "rslora"
"""Of every run, whatever its rank: DyLoRA at rank b is LoRA of rank b with scaling ALPHA / √b."""


class Cell(NamedTuple):
    """What identifies a run. ``kind`` is "dylora" or "lora"."""

    kind: str
    rank: int
    rate: float
    steps: int
    seed: int


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train once; metrics on both splits, and the report loss of each window, at every rank the run can serve."""
    torch.set_num_threads(1)
    task, nested = short_punctuation(), cell.kind == "dylora"
    set_seed(cell.seed)
    model = task.build_model()
    adapters = ra.attach(model, rank=cell.rank, alpha=ALPHA, scale=SCALE, init="lora")
    started = time.perf_counter()
    callbacks = [ra.RankCallback(adapters, ra.RankBudget(fraction=1.0), "dylora")] if nested else []
    train(model, task, cell.steps, cell.rate, cell.seed, cell.steps // 10, callbacks)
    seconds = time.perf_counter() - started
    evaluations = {}
    for served in range(1, cell.rank + 1) if nested else [cell.rank]:
        with ra.at_rank(adapters, served):
            tune, report = (evaluate(task, model, split, BATCH) for split in ("tune", "report"))
        evaluations[str(served)] = {
            "params": served * sum(adapter.params_per_rank for adapter in adapters),
            "tune": tune.metrics, "report": report.metrics, "report_losses": report.example_losses,
        }  # fmt: skip
    return {**cell._asdict(), "alpha": ALPHA, "scale": SCALE, "seconds": seconds, "evaluations": evaluations}
