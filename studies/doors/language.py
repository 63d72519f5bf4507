"""Part "language": one run on the tiny Llama, in a loop of its own."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

import rankalloc as ra
from rankalloc.errors import RankallocError

from ..common.part import Cell
from . import llama
from .arms import DRIVEN, EQUAL, INITS, SCALING, peft_model

PEAK_RANK, MEAN_RANK = 8, 2
BUDGET = {"warmup": 0.1, "freeze": 0.4, "every": 8}


def run(cell: Cell) -> dict[str, Any]:
    """Adapt and judge once.

    AdamW at a rate that falls linearly to zero; gradients are clipped at norm 1.

    Raises:
        RankallocError: training diverged.
    """
    model, started = llama.pretrained(), time.process_time()
    torch.manual_seed(1000 + cell.seed)
    adapters, rank = None, MEAN_RANK if cell.arm == EQUAL else PEAK_RANK
    if cell.arm in INITS:
        adapters = ra.attach(model, rank=rank, alpha=SCALING * rank, init=INITS[cell.arm])
    else:
        wrapped = peft_model(model, rank, SCALING * rank, "all-linear")
        adapters = ra.adopt(wrapped) if cell.arm == DRIVEN else None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    peak = sum(parameter.numel() for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=cell.rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, cell.steps)
    controller = None
    if adapters is not None:
        per_rank = sum(shape.params_per_rank for shape in adapters.shapes())
        budget = ra.RankBudget(params=MEAN_RANK * per_rank, **BUDGET)
        controller = ra.RankController(adapters, budget, cell.steps, seed=cell.seed)
    tokens, generator = llama.sequences(llama.AFTER), torch.Generator().manual_seed(cell.seed)
    model.train()
    for _ in range(cell.steps):
        llama.loss_of(model, llama.batch_of(tokens, generator)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if controller is not None:
            controller.observe()
        optimizer.step()
        if controller is not None:
            controller.update(optimizer)
        optimizer.zero_grad()
        decay.step()
    if controller is not None:
        controller.finish(optimizer=optimizer)
    with torch.no_grad():
        loss = float(llama.loss_of(model.eval(), tokens))
    if not math.isfinite(loss):
        raise RankallocError(f"training diverged: the loss is {loss}")
    final = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "loss": loss, "peak_params": peak, "final_params": final,
        "ranks": adapters.ranks() if adapters is not None else None,
        "cpu_seconds": round(time.process_time() - started, 2),
    }  # fmt: skip
