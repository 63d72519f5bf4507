"""EVA: ranks to the directions that explain most of the inputs' variance (Paischer et al., arXiv 2410.07170).

Principal components of each layer's inputs are computed incrementally over the batches, without padding and ignored
labels, until every component in use has a cosine of at least τ to itself one batch earlier. The explained-variance
ratios of all layers are pooled and the largest are kept. Adapters start with Q = those components, P = 0.

Layers that receive the same tensor (query, key and value) share its components, which are computed once, and each
layer counts with its own share. The peak rank is the paper's ρ·r: with ρ = 2 and a budget of r × layers ranks, plan at
rank=2·r. Ranks equal those of PEFT's implementation (whiten=False), except that an odd rank goes to the first of the
layers that share an input.

Cost: one forward pass per batch and, per distinct input, one randomised SVD of (tokens + peak rank) × d_in; 2 × peak
rank × d_in numbers of state. Known weakness: the inputs' variance is not the task's; labels are never looked at.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...adapters.plan import Start
from ...errors import RankallocError
from ...layers.batches import IGNORED
from ...options import integer, number
from .base import Choose, Planner, Scores
from .incremental_pca import IncrementalPCA
from .probe import Probe


class EVA(Planner):
    """Explained-variance ratios as scores, components as the start; see the module docstring.

    Args:
        max_batches: how many batches to look at.
        tau: cosine from which a component counts as converged.
        passes: how often to go through the batches at most, until all components have converged.
    """

    name = "eva"

    def __init__(self, max_batches: int = 8, tau: float = 0.99, passes: int = 16) -> None:
        super().__init__(max_batches)
        self.tau, self.passes = number("tau", tau, 0, 1, ends="high"), integer("passes", passes, 1)

    @torch.no_grad()
    def scores(self, probe: Probe, choose: Choose) -> Scores:
        self.first = _shared_inputs(probe)
        members: dict[str, list[str]] = {}
        for name, first in self.first.items():
            members.setdefault(first, []).append(name)
        # layers with one input share its components, as many as the widest of them may use
        width = {first: max(probe.peaks[name] for name in names) for first, names in members.items()}
        self.pca = {first: IncrementalPCA(count, self.tau) for first, count in width.items() if count}
        ranks = {name: probe.peaks[name] for name in probe.targets}

        def open_ones() -> list[str]:
            used = {first: max(ranks[name] for name in members[first]) for first in self.pca}
            return [first for first, pca in self.pca.items() if not pca.converged[: used[first]].all()]

        for turn in range(self.passes * len(probe.batches)):
            active = open_ones()
            if not active:
                break
            self._take_in(probe, probe.batches[turn % len(probe.batches)], set(active))
            if all(pca.components is not None for pca in self.pca.values()):
                ranks = choose(self._ratios(probe))
        for first, pca in self.pca.items():
            if pca.components is None:
                raise RankallocError(
                    f"no batch gave {first} the {pca.count} tokens that planning its rank needs: use larger batches or "
                    "a lower rank, or exclude that layer"
                )
        if active := open_ones():
            probe.notes.append(
                f"eva: the components of {len(active)} of {len(self.pca)} inputs still moved after {self.passes} "
                f"passes over {len(probe.batches)} batches; more batches, or a lower tau, would settle them"
            )
        return self._ratios(probe)

    def initial(self, probe: Probe, ranks: Mapping[str, int]) -> dict[str, Start]:
        factors = {}
        for name, rank in ranks.items():
            if rank:
                Q = self.pca[self.first[name]].leading(rank).float().to(probe.device_of(name))
                factors[name] = Start(Q.new_zeros(probe.shape(name)[1], rank), Q)
        return factors

    def _ratios(self, probe: Probe) -> Scores:
        ratios = {first: pca.ratios.double().cpu().numpy() for first, pca in self.pca.items() if pca.ratios is not None}
        empty = np.zeros(0)
        return {name: ratios.get(self.first[name], empty)[: probe.peaks[name]] for name in probe.targets}

    def _take_in(self, probe: Probe, batch: Any, active: set[str]) -> None:
        mask = _token_mask(batch)

        def take(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
            if name in active:
                rows = _rows(x, mask)
                if not torch.isfinite(rows).all():
                    raise RankallocError(
                        f"the inputs of {name} are not finite on a batch: ranks cannot be planned from them; check the "
                        "batch and the model's weights"
                    )
                self.pca[name].take_in(rows)

        with probe.hooked(take):
            probe.forward(batch)


def _shared_inputs(probe: Probe) -> dict[str, str]:
    """{name: the first layer that receives the same tensor}, from one forward pass.

    Tensors are compared by identity, not by value: the same object, still alive, and not written to in between."""
    seen: dict[int, tuple[weakref.ref, int, str]] = {}
    first: dict[str, str] = {}

    def note(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        known = seen.get(id(x))
        if known is None or known[0]() is not x or known[1] != x._version:
            known = seen[id(x)] = (weakref.ref(x), x._version, name)
        first.setdefault(name, known[2])

    with probe.hooked(note):
        probe.forward(probe.batches[0])
    return {name: first.get(name, name) for name in probe.targets}


def _token_mask(batch: Any) -> torch.Tensor | None:
    """(examples, tokens) bool, True for tokens that are not padding and whose label counts; None without a mask."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    mask = mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    tokens = batch.get("input_ids")
    # labels of whole texts do not belong to tokens, so they do not select any
    if isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        like = mask if mask is not None else tokens
        if isinstance(like, torch.Tensor) and like.shape == labels.shape:
            counted = labels != IGNORED
            mask = counted if mask is None else mask & counted.to(mask.device)
    return mask


def _rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The inputs (..., d_in) as rows (tokens, d_in), masked where the mask fits their shape."""
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        return x[mask.to(x.device)]
    return x.reshape(-1, x.shape[-1])
