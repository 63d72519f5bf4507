"""The arms: ranks chosen by ``auto`` through either door, and plain LoRA with equal ranks.

All adapt the seven linear layers of a block, with alpha / rank = 2. At half a rank a layer equal ranks mean rank 1 in
half of the blocks: three patterns, of which tuning takes one, as it takes a rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

import rankalloc as ra

from ..common.part import Cell

ATTACH, DRIVEN = "auto, attach", "auto, PEFT driven"
UNIFORM = "LoRA, every layer"
EVERY_OTHER, UPPER, LOWER = "LoRA, every other block", "LoRA, upper blocks", "LoRA, lower blocks"
PATTERNS: dict[str, Callable[[int, int], bool]] = {
    UNIFORM: lambda block, blocks: True,
    EVERY_OTHER: lambda block, blocks: block % 2 == 1,
    UPPER: lambda block, blocks: block >= blocks // 2,
    LOWER: lambda block, blocks: block < blocks // 2,
}
"""{arm of equal ranks: whether a block, of so many, is adapted}."""
SCALING = 2
PEAK_RANK = {"half": 2, "two": 8}
"""The rank that ``auto`` begins at, for each budget."""
MEAN_RANK = {"half": 0.5, "two": 2}
"""The budget in ranks a layer."""
SCHEDULE = {"warmup": 0.1, "freeze": 0.4, "every": 4}


def budget_of(cell: Cell, model: nn.Module) -> ra.RankBudget:
    """The budget in parameters of plain LoRA: so many ranks in every linear layer of every block."""
    per_rank = sum(sum(layer.weight.shape) for layer in _linear(model).values())
    return ra.RankBudget(params=int(MEAN_RANK[cell.place] * per_rank), **SCHEDULE)


def adapted(cell: Cell, model: nn.Module) -> tuple[nn.Module, list[Any]]:
    """The model with the arm's adapters, and the Trainer's callbacks that choose their ranks."""
    names, budget, rank = list(_linear(model)), budget_of(cell, model), PEAK_RANK[cell.place]
    if cell.arm == ATTACH:
        adapters = ra.attach(model, rank=rank, alpha=SCALING * rank, target_modules=names)
        return model, [ra.RankCallback(adapters, budget, save_trace=False)]
    if cell.arm in PATTERNS:
        rank, blocks = max(1, int(MEAN_RANK[cell.place])), len(model.model.layers)
        names = [name for name in names if PATTERNS[cell.arm](int(name.split(".")[2]), blocks)]
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=names))
    return model, [ra.RankCallback(budget=budget, save_trace=False)] if cell.arm == DRIVEN else []


def _linear(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in name}  # fmt: skip
