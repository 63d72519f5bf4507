"""From jobs to batches of runs that train at once, and from those to losses on the tune split."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from rankalloc.errors import DataError
from rankalloc.experiments.tasks.base import PreparedTask

from ..arms import SCALING, params_of, task_of
from .factors import NAMES, Factors
from .model import FrozenBert
from .training import Data, Fleet, Spec
from .variants import VARIANTS, pattern


class Job(NamedTuple):
    """What identifies a run. The start, the classifier and the order of batches come from the seed; dropout's masks are
    those of the batch of runs that it is part of."""

    task: str
    size: str
    variant: str
    rate: float
    steps: int
    seed: int


class Outcome(NamedTuple):
    """A finished run: loss on the tune split in nats a word (None where training diverged), the share of words that are
    right, and the parameters of its final ranks."""

    loss: float | None
    accuracy: float
    params: int


@functools.cache
def place_of(task: str, device: str) -> tuple[FrozenBert, Data, Data, int, int]:
    """The frozen model, the train and tune splits, and the batch size and warm-up of the study's configuration."""
    config, prepared, _ = task_of(task)
    train, tune = (_tensors(prepared, split, device) for split in ("train", "tune"))
    base = FrozenBert(prepared.build_model(), device)
    return base, train, tune, config.training.batch_size, config.training.warmup_steps


def _tensors(task: PreparedTask, split: str, device: str) -> Data:
    batch = task.collator(list(task.splits[split]))
    if "token_type_ids" in batch and batch["token_type_ids"].any():
        raise DataError(f"{split}: all tokens must be of type 0 here")
    mask = batch["attention_mask"].bool()
    return Data(batch["input_ids"].to(device), batch["labels"].to(device), mask.to(device))


def ranks_of(job: Job, base: FrozenBert) -> list[int]:
    """The ranks that a run begins with."""
    variant, shapes = VARIANTS[job.variant], base.shapes
    if variant.rule is not None:
        return [variant.rank] * len(shapes)
    ranks = pattern(job.variant, shapes, params_of(shapes, job.size))
    return [ranks[shape.name] for shape in shapes]


def batches(jobs: Sequence[Job], at_once: int, device: str) -> Iterator[list[Job]]:
    """Jobs that can train at once: of one task, number of steps and parametrisation, and of about the same rank."""
    alike: dict[tuple, list[Job]] = {}
    for job in jobs:
        peak = max(ranks_of(job, place_of(job.task, device)[0]))
        of = (job.task, job.steps, VARIANTS[job.variant].init, 1 << max(0, peak - 1).bit_length())
        alike.setdefault(of, []).append(job)
    for own in alike.values():
        for start in range(0, len(own), at_once):
            yield own[start : start + at_once]


def outcomes_of(jobs: Sequence[Job], device: str, dropout: bool = True) -> list[Outcome]:
    """Train the runs of a batch at once, and judge them."""
    fleet, train, tune, rows = fleet_of(jobs, device, dropout)
    torch.manual_seed(jobs[0].seed)
    fleet.train(train, rows)
    losses, accuracies = fleet.losses(tune)
    costs = torch.tensor([shape.params_per_rank for shape in fleet.base.shapes], device=fleet.factors.held.device)
    params = (fleet.factors.held * costs).sum(1).tolist()
    return [
        Outcome(round(loss, 6) if math.isfinite(loss) else None, accuracy, spent)
        for loss, accuracy, spent in zip(losses, accuracies, params, strict=True)
    ]


def fleet_of(jobs: Sequence[Job], device: str, dropout: bool) -> tuple[Fleet, Data, Data, torch.Tensor]:
    """The runs of a batch before their first step, the two splits, and the rows (K, steps, batch) they train on."""
    base, train, tune, batch, warmup = place_of(jobs[0].task, device)
    variants, steps = [VARIANTS[job.variant] for job in jobs], jobs[0].steps
    held = torch.tensor([ranks_of(job, base) for job in jobs], device=device)
    peak, init = int(held.max()), variants[0].init
    rules = [variant.rule for variant in variants]
    stds = [rule.std if rule else 0.02 for rule in rules]
    generators = [torch.Generator().manual_seed(1000 + job.seed) for job in jobs]
    later = [torch.Generator().manual_seed(2000 + job.seed) for job in jobs]
    rows = torch.stack([_rows(len(train.ids), steps * batch, g).view(steps, batch) for g in generators]).to(device)
    starts = [start_of(base, peak, init, std, g) for std, g in zip(stds, generators, strict=True)]
    start = {name: [torch.cat(parts).to(device) for parts in zip(*(s[name] for s in starts), strict=True)]
             for name in NAMES}  # fmt: skip
    classes = len(base.bias)
    weights = torch.stack([torch.randn(classes, base.width, generator=g) * base.std for g in generators]).to(device)
    specs = [
        Spec(job.rate, rule, rule and rule.plan(base.shapes, variant.rank, params_of(base.shapes, job.size), steps))
        for job, variant, rule in zip(jobs, variants, rules, strict=True)
    ]

    def renewed(run: int) -> dict[str, list[torch.Tensor]]:
        fresh = start_of(base, peak, init, stds[run], later[run])
        return {name: [tensor.to(device) for tensor in tensors] for name, tensors in fresh.items()}

    factors = Factors(base.shapes, start, held, init, SCALING)
    heads = weights, base.bias.repeat(len(jobs), 1)
    return Fleet(base, factors, heads, specs, steps, warmup, renewed, dropout), train, tune, rows


def start_of(
    base: FrozenBert, rank: int, init: str, std: float, generator: torch.Generator
) -> dict[str, list[torch.Tensor]]:
    """The factors that one run begins with, (1, …) each, as the package draws them."""
    found: dict[str, Any] = {name: [] for name in NAMES}
    for shape in base.shapes:
        if init == "svd":
            found["P"].append(torch.randn(1, shape.d_out, rank, generator=generator) * std)
            found["Q"].append(torch.randn(1, rank, shape.d_in, generator=generator) * std)
        else:
            found["P"].append(torch.zeros(1, shape.d_out, rank))
            drawn = torch.rand(1, rank, shape.d_in, generator=generator)
            found["Q"].append((2 * drawn - 1) / math.sqrt(shape.d_in))
        found["lam"].append(torch.full((1, rank), float(init != "svd")))
    return found


def _rows(examples: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` rows: one shuffled pass over the examples after another."""
    passes = [torch.randperm(examples, generator=generator) for _ in range(-(-count // examples))]
    return torch.cat(passes)[:count]
