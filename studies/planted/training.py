"""One run of the study: a student, a method and a seed, and how well the ranks it ends with fit."""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.budget import budget_of
from rankalloc.errors import RankallocError
from rankalloc.methods import Method

from .problems import VARIANTS, Problem, plant

PROTOCOL = 2
"""Version of everything a run does that its cell does not say. Runs of different protocols are never compared."""
RANK, STEPS, PLANNING_BATCHES = 12, 600, 8
BETAS = (0.9, 0.99)  # a short memory of squared gradients: they fall by many orders of magnitude in 600 steps
RATES = {"svd": 1e-2, "svd, own basis": 2e-2, "lora": 2e-2, "gate": 4e-2}
"""Learning rate by parametrisation; see README.md for the runs, on a seed the study does not use, that chose them."""
NEEDS_OPTIONS = ("manual",)
CONTROLS = ("singular-value/uniform",)


Door = Callable[[nn.Module, str, Mapping[str, int] | None], ra.Adapters]
"""Puts adapters of rank :data:`RANK` at scale 1 beside a student's linear layers: (student, the method's
parametrisation, planned ranks where there are any) to adapters."""


def attached(student: nn.Module, init: str, ranks: Mapping[str, int] | None = None) -> ra.Adapters:
    """This study's :data:`Door`: the package's own adapters."""
    return ra.attach(student, rank=RANK, alpha=RANK, ranks=ranks, init=init)


def default_method() -> str:
    """The package's default, against which the others are compared."""
    return "auto" if "auto" in ra.METHODS else "singular-value"


def method_names() -> list[str]:
    """Every registered method that needs no option, and a control ("method/placement")."""
    return [*(name for name in ra.METHODS if name not in NEEDS_OPTIONS), *CONTROLS]


def few_methods() -> list[str]:
    """The handful of methods for the variants that do not run them all."""
    wanted = (default_method(), "singular-value", "adalora", "first-order", "uniform")
    return [name for name in dict.fromkeys(wanted) if name in ra.METHODS]


def parametrisation(name: str) -> str:
    """The parametrisation a method trains, a key of :data:`RATES` where the study has one."""
    method = ra.METHODS[name.partition("/")[0]]
    return "svd, own basis" if method.init == "svd" and not method.canonical else method.init


def rate_of(name: str) -> float:
    return RATES.get(parametrisation(name), 1e-2)


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def run(
    variant: str, architecture: str, method: str, seed: int, rate: float, steps: int = STEPS,
    problem: Problem | None = None, door: Door = attached,
) -> dict:
    """Train one student and compare its ranks and outputs with the teacher's.

    Args:
        method: a name of :func:`method_names`; "name/placement" is a control of that method.
        problem: instead of the one that ``variant`` and ``seed`` draw.
        door: how the student gets its adapters.

    Raises:
        RankallocError: from the method, or because the student's error is not finite.
    """
    problem = problem or plant(architecture, seed, **VARIANTS[variant])
    planted = sum(problem.ranks.values())
    total = planted // 2 if variant == "half" else planted
    student, started = copy.deepcopy(problem.base), time.process_time()
    name, _, placement = method.partition("/")
    budget = ra.RankBudget(ranks=total, warmup=0.2, freeze=0.4, every=20)
    chosen = ra.METHODS[name]
    torch.manual_seed(1000 + seed)
    ranks = _planned(student, problem, chosen, budget, seed) if chosen.when == "before" else None
    adapters = door(student, chosen.init, ranks)
    if ranks is not None:
        budget = budget_of(adapters.shapes(), budget)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=rate, betas=BETAS, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 if step < 0.6 * steps else max(1e-3, (1 - step / steps) / 0.4) ** 1.5
    )
    options = {"placement": placement} if placement else {}
    controller = ra.RankController(adapters, budget, steps, name, seed=seed, **options)
    for batch in problem.batches(torch.Generator().manual_seed(seed), steps):
        loss_of(student, batch).backward()
        controller.observe()
        optimizer.step()
        controller.update(optimizer)
        optimizer.zero_grad()
        decay.step()
    controller.finish(optimizer=optimizer)
    found, error = adapters.ranks(), problem.relative_error(student.eval())
    if not math.isfinite(error):
        raise RankallocError(f"training diverged: the student's error is {error}")
    return {
        "protocol": PROTOCOL, "variant": variant, "architecture": architecture, "method": method, "seed": seed,
        "rate": rate, "steps": steps, "init": adapters.init, "planted": planted, "budget": total,
        "spent": sum(found.values()), "planted_ranks": problem.ranks, "ranks": found, **fit(found, problem.ranks),
        "relative_error": error, "cpu_seconds": round(time.process_time() - started, 2),
    }


def fit(found: Mapping[str, int], planted: Mapping[str, int]) -> dict[str, float]:
    """Share of layers with exactly the planted rank, and share of the found ranks above what was planted."""
    return {
        "exact": sum(found[layer] == rank for layer, rank in planted.items()) / len(planted),
        "misplaced": sum(max(0, found[layer] - rank) for layer, rank in planted.items()) / max(1, sum(found.values())),
    }


def _planned(student: nn.Module, problem: Problem, method: Method, budget: ra.RankBudget, seed: int) -> dict[str, int]:
    """The ranks of a method that chooses before training, from a few batches that training does not see."""
    takes = inspect.signature(ra.plan_ranks).parameters
    given = {"loss_fn": F.mse_loss} if "loss_fn" in takes else {}
    batches: Iterable | None = None
    if getattr(method, "planner", None):
        batches = list(problem.batches(torch.Generator().manual_seed(5000 + seed), PLANNING_BATCHES))
    return ra.plan_ranks(student, batches, budget, method.name, rank=RANK, **given)
