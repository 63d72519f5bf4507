"""Training of many runs at once: batched AdamW with clipping and a schedule, and allocations at each run's own steps.

The order of a step is the package's: gradients, clipping, averages of the scores, AdamW, allocation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from rankalloc.budget import BudgetPlan

from .canonical import canonicalize
from .factors import NAMES, Factors
from .model import FrozenBert
from .rules import AVERAGES, Rule

BETA = 0.85
BETAS, EPS, MAX_NORM = (0.9, 0.999), 1e-8, 1.0
IGNORED = -100


@dataclass(frozen=True)
class Spec:
    """One run of a batch: its learning rate, its ``rule`` with the plan it goes by, or None for ranks that stay."""

    rate: float
    rule: Rule | None = None
    plan: BudgetPlan | None = None


@dataclass(frozen=True)
class Data:
    """A split as tensors: ids and labels (n, T) and ``mask`` (n, T), True where a token is not padding."""

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor


class Fleet:
    """K runs that train together on one frozen model.

    Args:
        factors: the adapters, at their start.
        heads: the classifiers: weights (K, classes, d) and biases (K, classes).
        specs: of the K runs.
        steps, warmup: the learning rate rises for ``warmup`` of ``steps``, then falls to zero.
        renewed: a run's number -> its new factors, for rules that draw them anew at the freeze.
        dropout: whether dropout is on.
    """

    def __init__(
        self, base: FrozenBert, factors: Factors, heads: tuple[torch.Tensor, torch.Tensor], specs: Sequence[Spec],
        steps: int, warmup: int, renewed: Callable[[int], dict[str, list[torch.Tensor]]] | None = None,
        dropout: bool = True,
    ) -> None:
        self.base, self.factors, self.heads, self.specs = base, factors, heads, list(specs)
        self.steps, self.warmup, self.renewed, self.dropout = steps, warmup, renewed, dropout
        self.device = heads[0].device
        self.rates = self._each([spec.rate for spec in specs])
        self.speed = {
            name: self._each([spec.rule.speed.get(name, 1.0) if spec.rule else 1.0 for spec in specs]) for name in NAMES
        }
        self.moments = [(torch.zeros_like(head), torch.zeros_like(head)) for head in heads]
        self.age = self._each([0.0] * len(specs))
        if any(spec.rule for spec in specs):
            factors.averages = {name: torch.zeros(factors.kept.shape, device=self.device) for name in AVERAGES}

    def _each(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=self.device, dtype=torch.float64)

    def train(self, data: Data, rows: torch.Tensor) -> torch.Tensor:
        """Train on ``rows`` (K, steps, batch) of ``data``; returns the losses, (steps, K)."""
        return torch.stack([self.step(step, data, rows[:, step - 1]) for step in range(1, self.steps + 1)])

    def step(self, step: int, data: Data, rows: torch.Tensor) -> torch.Tensor:
        """One step of all runs, counted from 1, on ``rows`` (K, batch); returns their losses (K,)."""
        leaves = [self.factors.of(name)[layer] for name, layer in self.factors.trained()]
        for tensor in (*(t for name in NAMES for t in self.factors.of(name)), *self.heads):
            tensor.grad = None
        for tensor in (*leaves, *self.heads):
            tensor.requires_grad_(True)
        labels = data.labels[rows].flatten(1)
        logits = self.base.logits(self.factors, self.heads, data.ids[rows], data.mask[rows], self.dropout)
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        loss = each.view(labels.shape).sum(1) / (labels != IGNORED).sum(1).clamp_min(1)
        loss.sum().backward()
        with torch.no_grad():
            squares = [tensor.grad.flatten(1).square().sum(1) for tensor in (*leaves, *self.heads)]
            clip = (MAX_NORM / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp_max(1.0)
            for tensor in (*leaves, *self.heads):
                tensor.grad.mul_(_as(clip, tensor))
            self._observe()
            self._update(step)
            self._allocate(step)
        return loss.detach()

    def _observe(self) -> None:
        """Take this step's gradients into the averages that scores are made of."""
        factors = self.factors
        if not factors.averages:
            return
        nothing = torch.zeros_like(factors.lam[0])
        sizes = factors.sizes()
        if factors.init == "svd":
            lam = torch.stack([t.detach() for t in factors.lam], 1)
            gradient = torch.stack([nothing if t.grad is None else t.grad for t in factors.lam], 1)
            product = lam * gradient
        else:
            product = torch.stack([nothing if p.grad is None else (p.detach() * p.grad).sum(1) for p in factors.P], 1)
            gradient = product / torch.where(sizes == 0, 1.0, sizes)
        now = dict(zip(AVERAGES, (product.abs(), gradient.abs(), product.square(), product), strict=True))
        for name, average in factors.averages.items():
            average.mul_(BETA).add_(now[name].float(), alpha=1 - BETA)

    def _update(self, step: int) -> None:
        """AdamW without weight decay. The rate of the first step is zero, as in transformers."""
        done = step - 1
        share = done / self.warmup if done < self.warmup else (self.steps - done) / max(1, self.steps - self.warmup)
        self.age += 1
        factors, rates = self.factors, self.rates * share
        for name, layer in factors.trained():
            moments = factors.first[name][layer], factors.second[name][layer]
            self._adam(factors.of(name)[layer], moments, rates * self.speed[name])
        for head, moments in zip(self.heads, self.moments, strict=True):
            self._adam(head, moments, rates)

    def _adam(self, tensor: torch.Tensor, moments: tuple[torch.Tensor, torch.Tensor], rates: torch.Tensor) -> None:
        (first, second), gradient = moments, tensor.grad
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        of_first, of_second = (1 - beta**self.age for beta in BETAS)
        size = second.sqrt() / _as(of_second.sqrt(), tensor) + EPS
        tensor.data.sub_(_as(rates / of_first, tensor) * first / size)

    def _allocate(self, step: int) -> None:
        """The cuts of the runs whose plan has one after ``step``."""
        cut = [k for k, spec in enumerate(self.specs) if spec.plan and spec.plan.allocates(step)]
        cut = [k for k, finite in zip(cut, self._finite(cut), strict=True) if finite]
        if not cut:
            return
        factors, runs = self.factors, torch.tensor(cut, device=self.device)
        canonicalize(factors, runs)
        sizes = factors.sizes()[runs].double().cpu().numpy()
        held = factors.held[runs].cpu().numpy()
        averages = {name: average[runs].double().cpu().numpy() for name, average in factors.averages.items()}
        chosen = [
            self._rule(k).choose(self._plan(k), step, held[at], sizes[at], {n: v[at] for n, v in averages.items()})
            for at, k in enumerate(cut)
        ]
        kept, stays = (torch.from_numpy(np.stack(masks)).to(self.device) for masks in zip(*chosen, strict=True))
        factors.drop(runs, kept)
        factors.select(runs, stays)
        for k in cut:
            rule = self._rule(k)
            if rule.rms is not None:
                self._rescale(k, rule.rms)
            if rule.renew and step == self._plan(k).freeze_step:
                self._renew(k)

    def _finite(self, runs: Sequence[int]) -> list[bool]:
        """Whether each run's factors are finite; one that has diverged is not cut any more."""
        if not runs:
            return []
        sums = [t.detach()[list(runs)].flatten(1).sum(1) for name in NAMES for t in self.factors.of(name)]
        return torch.isfinite(torch.stack(sums).sum(0)).tolist()

    def _rule(self, run: int) -> Rule:
        rule = self.specs[run].rule
        assert rule is not None, "a run with a plan has a rule"
        return rule

    def _plan(self, run: int) -> BudgetPlan:
        plan = self.specs[run].plan
        assert plan is not None
        return plan

    def _rescale(self, run: int, rms: float) -> None:
        """Bring the columns of P and the rows of Q, which are orthonormal, to entries of ``rms`` at the same update."""
        factors = self.factors
        for name in ("P", "Q"):
            for layer, shape in enumerate(factors.shapes):
                c = rms * math.sqrt(shape.d_out if name == "P" else shape.d_in)
                for of, by in ((name, c), ("lam", 1 / c)):
                    factors.of(of)[layer].data[run] *= by
                    factors.first[of][layer][run] /= by
                    factors.second[of][layer][run] /= by**2

    def _renew(self, run: int) -> None:
        assert self.renewed is not None, "a rule that draws factors anew needs them"
        self.factors.renew(run, self.renewed(run))
        self.age[run] = 0
        for moments in self.moments:
            for moment in moments:
                moment[run] = 0

    @torch.no_grad()
    def losses(self, data: Data, batch: int = 60) -> tuple[list[float], list[float]]:
        """(mean loss a word, share of words that are right) of every run on a split, without dropout."""
        runs = len(self.specs)
        total, right = (torch.zeros(runs, device=self.device, dtype=torch.float64) for _ in range(2))
        counted = data.labels != IGNORED
        for start in range(0, len(data.ids), batch):
            part = slice(start, start + batch)
            ids, mask = (t[part].expand(runs, -1, -1) for t in (data.ids, data.mask))
            logits = self.base.logits(self.factors, self.heads, ids, mask, dropout=False)
            where = counted[part].flatten()
            labels = data.labels[part].flatten()[where]
            for run in range(runs):  # the logits of all words of all runs at once would not fit
                own = logits[run][where]
                total[run] += F.cross_entropy(own, labels, reduction="sum")
                right[run] += (own.argmax(-1) == labels).sum()
        words = int(counted.sum())
        return (total / words).tolist(), (right / words).tolist()


def _as(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """One number a run, (K,), shaped to be multiplied with a tensor (K, …)."""
    return values.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1))
