"""One run of the study: trained, and judged on one split."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rankalloc.errors import RankallocError
from rankalloc.experiments.runner import train

from ..common.part import SPLITS
from .arms import Cell, configuration, task_of


def run_cell(cell: Cell) -> dict[str, Any]:
    """A run's record. One that diverged has a "message" and nothing measured.

    "params" are those of the LoRA that ships; VeRA and LoRA-XS train fewer, and "trained" says how many.
    """
    torch.set_num_threads(1)
    _, task, _ = task_of(cell.task)
    started, split = time.perf_counter(), SPLITS[cell.phase]
    record: dict[str, Any] = {**cell._asdict(), "device": _device()}
    try:
        with tempfile.TemporaryDirectory() as folder:
            trace = train(configuration(cell), Path(folder), prepared=task, splits=(split,))
    except RankallocError as error:
        if type(error) is not RankallocError:  # a mistake in the settings, not an outcome
            raise
        return {**record, "message": str(error), "seconds": round(time.perf_counter() - started, 2)}
    metrics = trace.evaluations[0].metrics
    ranks = {layer.name: rank for layer, rank in zip(trace.layers, trace.final_ranks, strict=True) if rank}
    return {
        **record, "loss": metrics["loss"], "metric": metrics[task.metric], "params": trace.adapter_params_final,
        "trained": trace.trained_params_final, "ranks": ranks, "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
