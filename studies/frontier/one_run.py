"""One run of the study: trained, cut to every budget that it answers, and judged at each on one split."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import rankalloc as ra
from rankalloc.errors import RankallocError
from rankalloc.experiments.runner import evaluate_saved, train

from ..common.part import SPLITS
from .annealing import train_annealed
from .arms import (
    ANNEALED,
    CUT,
    DYLORA,
    MATRYOSHKA,
    RANKS,
    RECOVERED,
    RECOVERING,
    Cell,
    configuration,
    further_steps,
    params_of,
    served_by,
    task_of,
)  # fmt: skip

NESTED = (DYLORA, MATRYOSHKA)


def run_cell(cell: Cell) -> dict[str, Any]:
    """A run's record: {kind of cut: {rank: loss, metric and parameters}}. One that diverged has a "message"."""
    torch.set_num_threads(1)
    config, (_, task, shapes) = configuration(cell), task_of(cell.task)
    started = time.perf_counter()
    record: dict[str, Any] = {**cell._asdict(), "device": _device()}
    try:
        with tempfile.TemporaryDirectory() as place:
            folder, budgets = Path(place), {rank: params_of(shapes, rank) for rank in served_by(cell.arm, cell.rank)}
            if cell.arm == ANNEALED:
                train_annealed(config, task, budgets, folder / "passed")
            else:
                train(config, folder, prepared=task, splits=())
            found = _judged(cell, folder, budgets)
    except RankallocError as error:
        if type(error) is not RankallocError:  # a mistake in the settings, not an outcome
            raise
        found = {"message": str(error)}
    return {**record, **found, "seconds": round(time.perf_counter() - started, 2)}


def _judged(cell: Cell, folder: Path, budgets: dict[int, int]) -> dict[str, Any]:
    config, (_, task, _) = configuration(cell), task_of(cell.task)
    recovers = cell.phase == "seeds" and cell.arm in RECOVERING
    kinds: dict[str, dict[str, Any]] = {CUT: {}} | ({RECOVERED: {}} if recovers else {})
    for rank, params in budgets.items():
        whole = folder / "passed" / str(rank) if cell.arm == ANNEALED else folder / "adapter"
        place = folder / "cuts" / str(rank)
        ra.shrink(whole, ra.RankBudget(params=params), place, cut="nested" if cell.arm in NESTED else "svd")
        kinds[CUT][str(rank)] = _evaluated(cell, place)
        if recovers:
            if rank != RANKS[-1]:
                ra.recover(place, config, further_steps(cell.steps), place, prepared=task)
            kinds[RECOVERED][str(rank)] = _evaluated(cell, place)
    return kinds


def _evaluated(cell: Cell, adapter: Path) -> dict[str, Any]:
    config, (_, task, _) = configuration(cell), task_of(cell.task)
    metrics = evaluate_saved(config, task, adapter, SPLITS[cell.phase]).metrics
    return {"loss": metrics["loss"], "metric": metrics[task.metric]}


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
