"""Whole runs on punctuation with MiniLM-L6: from rank 12 to frozen ranks, beside PEFT LoRA and AdaLoRA.

The model keeps its dropout of 0.1, or has none, as in the other parts. Drawing masks, and an attention that must be
written out to be masked, take over a quarter of a step in every kind, which brings their ratios nearer to one.

Every kind trains on the same batches at its own best rate of three, chosen by one run each on the tune split. Runs that
are compared take turns of a few steps, in an order that is reversed from turn to turn, so that a change in the
machine's speed affects all of them equally. A run's seconds are the sum of its steps', allocations included and
evaluation left out. Each run has its own random state, so that it ends as it would alone.
"""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup, set_seed

import rankalloc as ra
from rankalloc.experiments.tasks.base import evaluate

from . import arms
from .arms import DEFAULT, PEFT_ADALORA, PEFT_LORA

RATES = {PEFT_LORA: (1e-3, 2e-3, 4e-3), PEFT_ADALORA: (4e-3, 8e-3, 1.6e-2), DEFAULT: (4e-3, 8e-3, 1.6e-2)}
PEERS = (PEFT_LORA, PEFT_ADALORA)
WARMUP, FREEZE, EVERY = 0.1, 0.3, 5
TURN = 5
"""Steps in a turn: enough for a run's weights to come back into the cache."""


class Run:
    """One training run of ``kind``, a step at a time.

    Attributes:
        seconds: of each step so far.
        faults: page faults of the process in those steps.
    """

    def __init__(self, kind: str, rank: int, rate: float, steps: int, seed: int, task: Any, dropout: bool) -> None:
        set_seed(seed)
        self.kind, self.rate, self.seed, self.task = kind, rate, seed, task
        model, self.controller, head = task.build_model(), None, ["classifier"]
        if not dropout:
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        if kind == PEFT_LORA:
            model = get_peft_model(model, LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules=arms.BERT_TARGETS, modules_to_save=head,
                task_type="TOKEN_CLS",
            ))
        elif kind == PEFT_ADALORA:
            model = get_peft_model(model, AdaLoraConfig(
                init_r=rank, target_r=rank // 3, lora_alpha=2 * rank, target_modules=arms.BERT_TARGETS,
                tinit=round(WARMUP * steps), tfinal=round(FREEZE * steps), deltaT=EVERY, total_step=steps,
                modules_to_save=head, task_type="TOKEN_CLS",
            ))
        else:
            self.adapters = ra.attach(
                model, rank=rank, alpha=2 * rank, target_modules=arms.BERT_TARGETS, modules_to_save=head
            )
            left = sum(self.adapters.ranks().values()) // 3
            budget = ra.RankBudget(ranks=left, warmup=WARMUP, freeze=FREEZE, every=EVERY)
            self.controller = ra.RankController(self.adapters, budget, steps)
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0, fused=True)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, max(1, steps // 20), steps)
        self.seconds: list[float] = []
        self.faults = 0
        self._random = torch.get_rng_state()

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(self._random)
        faults, started = _page_faults(), time.perf_counter()
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        if self.controller is not None:
            self.controller.observe()
        self.optimizer.step()
        if self.controller is not None:
            self.controller.update(self.optimizer)
        elif self.kind == PEFT_ADALORA:
            self.model.base_model.update_and_allocate(len(self.seconds) + 1)
        self.schedule.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - started)
        self.faults += _page_faults() - faults
        self._random = torch.get_rng_state()

    def result(self) -> dict[str, Any]:
        """Seconds, page faults, tune loss and metrics, and the ranks left."""
        return {
            "kind": self.kind, "rate": self.rate, "seed": self.seed, "seconds": sum(self.seconds),
            "steps": [round(seconds, 4) for seconds in self.seconds], "page faults": self.faults,
            "tune": evaluate(self.task, self.model, "tune", 16).metrics,
            "ranks": sum(self.adapters.ranks().values()) if self.controller is not None else None,
        }


def side_by_side(
    rates: dict[str, float], rank: int, steps: int, seed: int, task: Any, dropout: bool
) -> list[dict[str, Any]]:
    """Run each kind at its rate, in turns; returns the results."""
    runs = [Run(kind, rank, rate, steps, seed, task, dropout) for kind, rate in rates.items()]
    batches = _batches(task, steps, seed)
    for first in range(0, steps, TURN):
        for run in runs if first // TURN % 2 else runs[::-1]:
            for batch in batches[first : first + TURN]:
                run.step(batch)
    return [run.result() for run in runs]


def _batches(task: Any, steps: int, seed: int) -> list[dict[str, torch.Tensor]]:
    loader = DataLoader(
        task.splits["train"], batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(seed),
        collate_fn=task.collator, drop_last=True,
    )
    batches: list[dict[str, torch.Tensor]] = []
    while len(batches) < steps:
        batches += [batch for batch, _ in zip(loader, range(steps - len(batches)), strict=False)]
    return batches


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(rank: int, steps: int, rounds: int, dropout: bool = True) -> dict[str, Any]:
    """Choose the rates, then make ``rounds`` runs of each kind at its own."""
    task = ra.load_task("punctuation", data={"limit_tune": 300})
    tried = [
        result for number in range(3)
        for result in side_by_side({k: RATES[k][number] for k in RATES}, rank, steps, 0, task, dropout)
    ]
    best = {k: min((r for r in tried if r["kind"] == k), key=lambda r: r["tune"]["loss"])["rate"] for k in RATES}
    runs = [r for seed in range(1, rounds + 1) for r in side_by_side(best, rank, steps, seed, task, dropout)]
    seconds = {k: [r["seconds"] for r in runs if r["kind"] == k] for k in RATES}
    # the median of a step over all rounds: noise in one round does not reach it
    typical = {
        k: sum(map(statistics.median, zip(*(r["steps"] for r in runs if r["kind"] == k), strict=True))) for k in RATES
    }
    return {
        "rank": rank, "steps": steps, "rounds": rounds, "rates tried": tried, "rates": best, "runs": runs,
        "tune": {
            kind: {m: statistics.fmean(r["tune"][m] for r in runs if r["kind"] == kind) for m in ("loss", "f1")}
            for kind in RATES
        },
        "ratios": {f"{DEFAULT} / {k}": arms.ratio(seconds[DEFAULT], seconds[k]) for k in PEERS},
        "ratios of median steps": {f"{DEFAULT} / {k}": typical[DEFAULT] / typical[k] for k in PEERS},
    }
