"""Evaluating adapter folders on a task, with a model that is built once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from ..adapters.attaching import detach
from ..errors import RankallocError
from ..methods.planners.planning import first_batches
from ..storage.loading import load
from .tasks.base import PreparedTask, base_of, evaluate


class TaskEvaluator:
    """``evaluate(folder)`` for :func:`rankalloc.frontier` and ``smallest``: the task's metric on a split.

    Attributes:
        higher_is_better: whether the task's metric is to be maximised.
        fingerprint: identifies task, data, model and split in a cache.
    """

    def __init__(self, task: PreparedTask, split: str = "tune", batch_size: int = 16) -> None:
        self.task, self.split, self.batch_size = task, split, batch_size
        self.model = base_of(task)
        self.higher_is_better = task.direction == "maximize"
        self.fingerprint = f"{task.name} {task.fingerprint} {task.model_name} {split} {task.metric}"

    def __call__(self, folder: Path) -> float:
        adapters = load(self.model, folder)
        try:
            found = evaluate(self.task, self.model, self.split, self.batch_size).metrics
        finally:
            detach(adapters)
        if self.task.metric not in found:
            raise RankallocError(f"the task's metric {self.task.metric} is not defined on its {self.split} split")
        value = found[self.task.metric]
        if not math.isfinite(value):  # a comparison with NaN would tell a result from nothing
            raise RankallocError(
                f"the task's metric {self.task.metric} is {value} on its {self.split} split with {folder}, "
                "which cannot be compared; does that adapter fit this task?"
            )
        return value

    def batches(self, count: int) -> Iterator[dict[str, torch.Tensor]]:
        """The first ``count`` training batches, for calibration."""
        return islice(first_batches(self.task.splits["train"], self.task.collator, self.batch_size), count)
