"""The adapters of the study, one step after another; each is measured once and kept in results.json."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import set_seed

import rankalloc as ra
from rankalloc.experiments.tasks.base import PreparedTask, evaluate
from rankalloc.layers.batches import IGNORED

from ..common.results import Results
from ..common.training import BATCH, short_punctuation, train

KINDS = ("data-free", "calibrated", "inputs")
TRAINED_FURTHER = ("data-free", "calibrated")
FURTHER_SHARE = 0.25
RANK = 16


def measure(task: PreparedTask, model: nn.Module) -> dict[str, Any]:
    """Tune and report metrics, and per report window what F1 is made of: hits, predicted marks, real marks."""
    kept: list[np.ndarray] = []

    def capture(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
        kept[:] = [predicted, expected]
        return task.metrics_of(predicted, expected)

    tune = evaluate(task, model, "tune", BATCH).metrics
    report = evaluate(replace(task, metrics_of=capture), model, "report", BATCH).metrics
    ends = np.cumsum([sum(label != IGNORED for label in row["labels"]) for row in task.splits["report"]])[:-1]
    counts = [
        [int(((p == e) & (e != 0)).sum()), int((p != 0).sum()), int((e != 0).sum())]
        for p, e in zip(*(np.split(part, ends) for part in kept), strict=True)
    ]
    return {"tune": tune, "report": report, "counts": counts}


class Study:
    """What has been measured, by name, and the means to measure the rest.

    ``args`` are those of run.py; ``args.work`` is the folder of the adapters.
    """

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        torch.set_num_threads(args.threads)
        self.args, self.results = args, results
        self.measured: dict[str, Any] = results.record["measured"]
        self.task = short_punctuation() if args.short else ra.load_task("punctuation")
        self._metrics: dict[str, Any] = {"data-free": None}

    def run(self) -> None:
        """Train, shrink and train further, whatever of it is missing."""
        args = self.args
        for rate in args.rates:
            self.once(f"full {rate:g}", functools.partial(self.full, rate))
        best = min(args.rates, key=lambda rate: self.measured[f"full {rate:g}"]["tune"]["loss"])
        self.results.record["rate"] = best
        for share in sorted(args.shares):
            for kind in KINDS:
                self.once(f"{kind} {share:g} of {best:g}", functools.partial(self.shrunk, kind, share, best))
        for kind in TRAINED_FURTHER:
            for rate in args.further:
                name = f"{kind} {FURTHER_SHARE:g} of {best:g} further {rate:g}"
                self.once(name, functools.partial(self.further, kind, best, rate))

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do ``work`` and keep what it finds, unless ``name`` has been measured."""
        if name in self.measured:
            return
        started = time.perf_counter()
        found = work()
        self.measured[name] = {**found, "seconds": time.perf_counter() - started}
        self.results.record |= {
            "steps": self.args.steps, "seed": self.args.seed, "rank": RANK, "shares": self.args.shares,
        }  # fmt: skip
        self.results.stamp()
        self.results.save()
        shown = ", ".join(f"{split} {found[split]['f1']:.4f}" for split in ("tune", "report"))
        print(f"{name}: F1 {shown}, {self.measured[name]['seconds']:.0f} s", file=sys.stderr, flush=True)

    def full(self, rate: float) -> dict[str, Any]:
        """The full adapter, trained at ``rate``."""
        set_seed(self.args.seed)
        model = self.task.build_model()
        adapters = ra.attach(model, rank=RANK, alpha=2 * RANK, init="lora")
        self._train(model, self.args.steps, rate, self.args.seed)
        ra.save(adapters, self._full_folder(rate))
        return {**measure(self.task, model), "params": adapters.num_params()}

    def shrunk(self, kind: str, share: float, best: float) -> dict[str, Any]:
        """The best full adapter, shrunk to ``share`` of its parameters in the metric of ``kind``."""
        budget = ra.RankBudget(params=int(share * self.measured[f"full {best:g}"]["params"]))
        folder = self._shrunk_folder(kind, share, best)
        result = ra.shrink(self._full_folder(best), budget, folder, metric=self._metric(kind, best))
        adapters = ra.load(self._model, folder)
        found = measure(self.task, self._model)
        ra.detach(adapters)
        return {
            **found, "params": result.params, "error": result.error, "metric_error": result.metric_error,
            "ranks": list(result.ranks.values()),
        }  # fmt: skip

    def further(self, kind: str, best: float, rate: float) -> dict[str, Any]:
        """The shrunk adapter after a tenth of the training steps more."""
        steps, seed = self.args.steps // 10, self.args.seed + 1
        set_seed(seed)
        model = self.task.build_model()
        adapters = ra.load(model, self._shrunk_folder(kind, FURTHER_SHARE, best))
        for adapter in adapters:
            adapter.lam.requires_grad_(False)  # plain LoRA continues as plain LoRA
        self._train(model, steps, rate, seed)
        return {**measure(self.task, model), "params": adapters.num_params(), "further_steps": steps}

    def _train(self, model: nn.Module, steps: int, rate: float, seed: int) -> None:
        train(model, self.task, steps, rate, seed, warmup=max(4, steps // 20))

    def _full_folder(self, rate: float) -> Path:
        return self.args.work / f"rate-{rate:g}"

    def _shrunk_folder(self, kind: str, share: float, best: float) -> Path:
        return self.args.work / f"{kind}-{share:g}-of-{best:g}"

    @functools.cached_property
    def _model(self) -> nn.Module:
        """The frozen model that shrunk adapters are judged on, one after another."""
        set_seed(self.args.seed)
        return self.task.build_model()

    def _metric(self, kind: str, best: float) -> Any:
        """None for data-free; else moments of training batches, those of gradients left aside for "inputs"."""
        if kind not in self._metrics:
            rows, size = self.task.splits["train"], BATCH * self.args.batches
            batches = [self.task.collator(rows[i : i + BATCH]) for i in range(0, size, BATCH)]
            self._metrics[kind] = ra.calibrate(
                self._model, self._full_folder(best), batches, inputs_only=kind == "inputs"
            )
        return self._metrics[kind]
