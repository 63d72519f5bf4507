"""Whole runs on punctuation with MiniLM-L6: from rank 12 to frozen ranks, beside PEFT LoRA and AdaLoRA.

The model keeps its own dropout of 0.1, or has none, as in the other parts: drawing masks and an attention that must be
written out to be masked take over a quarter of a step, alike in all kinds, which brings their ratios nearer to one.

Every kind trains on the same batches at its own best rate of three, chosen by one run each on the tune split. Timed
is everything from the first step to the last; nothing of what evaluates.
"""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

import arms
import torch
from arms import DEFAULT, PEFT_ADALORA, PEFT_LORA
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup, set_seed

import rankalloc as ra
from rankalloc.tasks.base import evaluate

RATES = {PEFT_LORA: (1e-3, 2e-3, 4e-3), PEFT_ADALORA: (4e-3, 8e-3, 1.6e-2), DEFAULT: (4e-3, 8e-3, 1.6e-2)}
WARMUP, FREEZE, EVERY = 0.1, 0.3, 5


def one_run(kind: str, rank: int, rate: float, steps: int, seed: int, task: Any, dropout: bool) -> dict[str, Any]:
    """Train once; seconds, tune loss and metrics, and the ranks left."""
    set_seed(seed)
    model, controller, head = task.build_model(), None, ["classifier"]
    if not dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    if kind == PEFT_LORA:
        model = get_peft_model(model, LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=arms.BERT_TARGETS, modules_to_save=head, task_type="TOKEN_CLS",
        ))
    elif kind == PEFT_ADALORA:
        model = get_peft_model(model, AdaLoraConfig(
            init_r=rank, target_r=rank // 3, lora_alpha=2 * rank, target_modules=arms.BERT_TARGETS,
            tinit=round(WARMUP * steps), tfinal=round(FREEZE * steps), deltaT=EVERY, total_step=steps,
            modules_to_save=head, task_type="TOKEN_CLS",
        ))
    else:
        adapters = ra.attach(model, rank=rank, alpha=2 * rank, target_modules=arms.BERT_TARGETS, modules_to_save=head)
        budget = ra.RankBudget(fraction=1 / 3, warmup=WARMUP, freeze=FREEZE, every=EVERY)
        controller = ra.RankController(adapters, budget, steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        task.splits["train"], batch_size=16, shuffle=True, generator=generator, collate_fn=task.collator,
        drop_last=True,
    )
    batches = []
    while len(batches) < steps:
        batches += [batch for batch, _ in zip(loader, range(steps - len(batches)), strict=False)]
    model.train()
    faults, started = _page_faults(), time.perf_counter()
    for step, batch in enumerate(batches, start=1):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if controller is not None:
            controller.observe()
        optimizer.step()
        if controller is not None:
            controller.update(optimizer)
        elif kind == PEFT_ADALORA:
            model.base_model.update_and_allocate(step)
        schedule.step()
        optimizer.zero_grad()
    seconds, faults = time.perf_counter() - started, _page_faults() - faults
    tune = evaluate(task, model, "tune", 16)
    ranks = sum(adapters.ranks().values()) if controller is not None else None
    return {
        "kind": kind, "rate": rate, "seed": seed, "seconds": seconds, "page faults": faults, "tune": tune.metrics,
        "ranks": ranks,
    }


def _page_faults() -> int:
    """Pages of memory that this process has had to ask for."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(rank: int, steps: int, rounds: int, dropout: bool = True) -> dict[str, Any]:
    """Rates first, then ``rounds`` alternating runs of each kind at its own."""
    task = ra.load_task("punctuation", data={"limit_tune": 300})
    kinds = (PEFT_LORA, PEFT_ADALORA, DEFAULT)
    tried = [one_run(kind, rank, rate, steps, 0, task, dropout) for kind in kinds for rate in RATES[kind]]
    best = {k: min((r for r in tried if r["kind"] == k), key=lambda r: r["tune"]["loss"])["rate"] for k in kinds}
    runs = []
    for number in range(rounds):
        for kind in kinds if number % 2 else kinds[::-1]:
            runs.append(one_run(kind, rank, best[kind], steps, 1 + number, task, dropout))
    seconds = {k: [r["seconds"] for r in runs if r["kind"] == k] for k in kinds}
    return {
        "rank": rank, "steps": steps, "rounds": rounds, "rates tried": tried, "rates": best, "runs": runs,
        "tune": {
            kind: {m: statistics.fmean(r["tune"][m] for r in runs if r["kind"] == kind) for m in ("loss", "f1")}
            for kind in kinds
        },
        "ratios": {f"{DEFAULT} / {k}": arms.ratio(seconds[DEFAULT], seconds[k]) for k in kinds[:2]},
    }
