"""The arms of part "routing", one seed after another; each is measured once and kept in results.json."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import set_seed

import rankalloc as ra
from rankalloc.experiments.tasks.base import PreparedTask, evaluate

from ..common.results import Results
from ..common.training import BATCH, train
from .domains import DOMAINS, both, domain

RANK = 8
SHARES = (1.0, 0.5)
"""Of the parameters of both adapters together."""
ROUTERS: dict[str, dict[str, Any]] = {
    "gate a layer": {"gate": "layer"},
    "gate a layer, sigmoid": {"gate": "layer", "activation": "sigmoid"},
    "gate a layer, scales": {"gate": "layer", "train": ("router", "scales")},
    "one gate": {"gate": "model"},
}
"""{arm: how ``ra.mix`` is called}."""
CONSTANT = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Parts of the first adapter that the best constant gates are chosen from."""


def judged(model: nn.Module, split: str) -> dict[str, Any]:
    """Loss and F1 of each domain on a split."""
    found = {name: evaluate(domain(name), model, split, BATCH).metrics for name in DOMAINS}
    return {key: {name: metrics[key] for name, metrics in found.items()} for key in ("loss", "f1")}


class Routing:
    """What has been measured, by name, and the means to measure the rest.

    ``args`` are those of run.py; ``args.work`` is the folder of the adapters.
    """

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        torch.set_num_threads(args.threads)
        transformers.logging.set_verbosity_error()
        self.args, self.results = args, results
        self.measured: dict[str, Any] = results.record["measured"]

    def run(self) -> None:
        """Train the adapters and measure every arm, whatever of it is missing."""
        for seed in range(self.args.seeds):
            wanted = self.arms(seed)
            if all(name in self.measured for name in wanted):
                continue
            for name in (*DOMAINS, "joint"):
                for rate in self.args.adapter_rates:
                    if not self._folder(name, rate, seed).is_dir():  # measured elsewhere, where its adapter stayed
                        self.measured.pop(f"{name} at {rate:g}, seed {seed}", None)
                    self.once(f"{name} at {rate:g}, seed {seed}", functools.partial(self.adapter, name, rate, seed))
            for name, work in wanted.items():
                self.once(name, work)

    def arms(self, seed: int) -> dict[str, Callable[[], dict[str, Any]]]:
        """{name: what measures it} of every arm that needs the adapters of a seed."""
        found: dict[str, Callable[[], dict[str, Any]]] = {}
        for share in SHARES:
            place = f"{share:g} of the parameters, seed {seed}"
            found |= {
                f"constant, {place}": functools.partial(self.constant, share, seed),
                f"average, {place}": functools.partial(self.fixed, 0.5, share, seed),
                f"compose, {place}": functools.partial(self.composed, share, seed),
                f"random router, {place}": functools.partial(self.random, share, seed),
            }
            for arm in ROUTERS:
                for rate in self.args.router_rates:
                    work = functools.partial(self.routed, arm, rate, share, seed)
                    found[f"{arm} at {rate:g}, {place}"] = work
        return found

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do ``work`` and keep what it finds, unless ``name`` has been measured."""
        if name in self.measured:
            return
        started = time.perf_counter()
        self.measured[name] = {**work(), "seconds": round(time.perf_counter() - started, 2)}
        self.results.record |= {
            "rank": RANK, "adapter_steps": self.args.adapter_steps, "router_steps": self.args.router_steps,
        }  # fmt: skip
        self.results.stamp()
        self.results.save()
        losses = self.measured[name]["report"]["loss"]
        shown = ", ".join(f"{domain} {loss:.4f}" for domain, loss in losses.items())
        print(f"{name}: {shown}, {self.measured[name]['seconds']:.0f} s", file=sys.stderr, flush=True)

    def adapter(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """A plain LoRA of one domain; or of both, with the parameters and the steps of two ("joint")."""
        joint = name == "joint"
        task, rank = (both(), 2 * RANK) if joint else (domain(name), RANK)
        model = self._fresh(task, seed)
        adapters = ra.attach(model, rank=rank, alpha=2 * rank, init="lora")
        self._train(model, task, self.args.adapter_steps * (1 + joint), rate, seed)
        ra.save(adapters, self._folder(name, rate, seed))
        return {**self._judged(model), "params": adapters.num_params()}

    def fixed(self, part: float, share: float, seed: int) -> dict[str, Any]:
        """The mixture with the same gates for every input."""
        mixture = self._mixture(share, seed)
        mixture.fix([part, 1 - part])
        return {**self._judged(mixture.model), "params": mixture.num_params(), "part": part}

    def constant(self, share: float, seed: int) -> dict[str, Any]:
        """The best constant gates on the tune split."""
        mixture = self._mixture(share, seed)

        def loss(part: float) -> float:
            mixture.fix([part, 1 - part])
            return sum(judged(mixture.model, "tune")["loss"].values())

        best = min(CONSTANT, key=loss)
        return self.fixed(best, share, seed)

    def composed(self, share: float, seed: int) -> dict[str, Any]:
        """One adapter: the sum of halves, in singular form, with the mean of the heads."""
        folder = self.args.work / f"composed-{share:g}-{seed}"
        result = ra.compose(self._folders(seed), [0.5, 0.5], self._budget(share), folder, heads="average")
        model = self._fresh(both(), seed)
        ra.load(model, folder)
        return {**self._judged(model), "params": result.params}

    def random(self, share: float, seed: int) -> dict[str, Any]:
        """Gates that depend on the input in a way that nobody trained."""
        mixture = self._mixture(share, seed)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for gate in mixture.gates.values():
                gate.weight.copy_(torch.randn(gate.weight.shape, generator=draw) * 2 / gate.weight.shape[1] ** 0.5)
        return {**self._judged(mixture.model), "params": mixture.num_params(), **self._shares(mixture)}

    def routed(self, arm: str, rate: float, share: float, seed: int) -> dict[str, Any]:
        """A trained router."""
        mixture = self._mixture(share, seed, **ROUTERS[arm])
        self._train(mixture.model, both(), self.args.router_steps, rate, seed)
        trained = sum(parameter.numel() for parameter in mixture.parameters())
        return {
            **self._judged(mixture.model), "params": mixture.num_params(), "trained": trained, **self._shares(mixture)
        }  # fmt: skip

    def _mixture(self, share: float, seed: int, **options: Any) -> Any:
        model = self._fresh(both(), seed)
        return ra.mix(model, dict(zip(DOMAINS, self._folders(seed), strict=True)), self._budget(share), heads="mixed",
                      **options)  # fmt: skip

    def _budget(self, share: float) -> ra.RankBudget:
        """The parameters that both adapters hold together, or a share of them."""
        held = sum(self.measured[self._best(name, seed=0)]["params"] for name in DOMAINS)
        return ra.RankBudget(params=int(share * held))

    def _shares(self, mixture: Any) -> dict[str, Any]:
        """{"gates": {domain: the mean gate of its own adapter}} over the tune split, all layers alike."""
        found = {}
        for k, name in enumerate(DOMAINS):
            rows, task = domain(name).splits["tune"], domain(name)
            batches = [task.collator([dict(row) for row in rows[i : i + BATCH]]) for i in range(0, len(rows), BATCH)]
            means = mixture.mean_gates(batches).values()
            found[name] = float(torch.stack([gates[k] for gates in means]).mean())
        return {"gates": found}

    def _best(self, name: str, seed: int) -> str:
        """The adapter of a domain at the rate with the lowest tune loss there."""
        names = [f"{name} at {rate:g}, seed {seed}" for rate in self.args.adapter_rates]
        return min(names, key=lambda key: self.measured[key]["tune"]["loss"][name])

    def _folders(self, seed: int) -> list[Path]:
        rates = self.args.adapter_rates
        made = {f"{name} at {rate:g}, seed {seed}": (name, rate) for name in DOMAINS for rate in rates}
        return [self._folder(*made[self._best(name, seed)], seed) for name in DOMAINS]

    def _folder(self, name: str, rate: float, seed: int) -> Path:
        return self.args.work / f"{name}-{rate:g}-{seed}"

    def _fresh(self, task: PreparedTask, seed: int) -> nn.Module:
        set_seed(seed)
        return task.build_model()

    def _train(self, model: nn.Module, task: PreparedTask, steps: int, rate: float, seed: int) -> None:
        train(model, task, steps, rate, seed, warmup=max(2, steps // 20))

    def _judged(self, model: nn.Module) -> dict[str, Any]:
        return {split: judged(model, split) for split in ("tune", "report")}
