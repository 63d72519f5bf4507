"""Operators that scoring and masking dispatch in a step, as counted from Python."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

import rankalloc as ra

from . import arms


class Count(TorchDispatchMode):
    """Counts every operator that reaches the dispatcher from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def of_one_step(kind: str, layers: int) -> dict[str, int]:
    """{"modules", "operators" of a step that does not allocate}; what the optimizer does is not counted."""
    batch = arms.bert_batch(2, 4)
    budget = ra.RankBudget(ranks=layers * arms.BERT_LAYERS * 4 // 2, warmup=0.0, every=1000, freeze=0.1)
    arm = arms.Arm(kind, arms.bert(layers, 32), arms.BERT_TARGETS, 4, budget=budget)
    for _ in range(3):
        arm.step(batch)
    arm.model(**batch).loss.backward()
    arm.count += 1
    with Count() as count:
        if kind == arms.PEFT_ADALORA:
            arm.model.base_model.update_and_allocate(arm.count)
        else:
            arm.controller.observe()
    arm.optimizer.step()
    if kind != arms.PEFT_ADALORA:
        with count:
            arm.controller.update(arm.optimizer)
    return {"modules": 6 * layers, "operators": sum(count.calls.values())}


def measure() -> dict[str, list[dict[str, int]]]:
    return {kind: [of_one_step(kind, layers) for layers in (2, 6, 12)] for kind in (arms.DEFAULT, arms.PEFT_ADALORA)}
