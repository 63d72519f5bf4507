"""DyLoRA: one run that can be cut to any rank afterwards.

Valipour et al., EACL 2023 (arXiv 2210.07558): each optimizer step draws b ~ U{1, …, r}, one for all layers and
for all micro-batches of the step, and trains the first b triplets alone:

    y = base(x) + (α / b) · P[:, :b] Q[:b] x          (their eq. 6)

Adapters attached with scale="rslora" take α / √b: what the first triplets learn at one rank then counts for more at
the others; in a probe of one seed (studies/dylora) it was better at every rank.

With ``frozen`` only triplet b learns in that step. Triplets outside do not move at all: what momentum or weight
decay would do to them is undone, unlike in the published code. Outside training mode every rank is used, where
the published code evaluates at the last one drawn.

At the freeze each layer is cut to a rank of its own, from the end (:mod:`.nested`); drawing goes on to the end, so that
every rank below stays usable: :func:`rankalloc.at_rank`.

Cost: a copy of P and Q during the optimizer's step. Known weakness: late triplets learn in few of the steps, so
at full rank it learns more slowly than LoRA; one b for all layers cannot know which layers need more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...errors import NotAdaptedError
from ...options import flag
from .nested import Nested


class Dylora(Nested):
    """Nested ranks; the formula is in the module docstring.

    Args:
        frozen: train only the last triplet of those drawn.

    Raises:
        NotAdaptedError: while training, when the model is in evaluation mode and no rank can be drawn.
    """

    name = "dylora"

    def __init__(self, *args: Any, frozen: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frozen = flag("frozen", frozen)
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def drawn(self, step: int) -> int:
        """b of optimizer step ``step``."""
        highest = max((adapter.initial_rank for adapter in self.adapters), default=1)
        return int(np.random.default_rng([self.seed, step]).integers(1, max(1, highest) + 1))

    def prepare(self, step: int) -> None:
        rank = self.drawn(step)
        for adapter in self.adapters:
            adapter.drawn = rank

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        if not all(adapter.training for adapter in self.adapters):
            raise NotAdaptedError("dylora draws its ranks in training mode; call model.train() before training")
        self._copies = [(adapter.P.clone(), adapter.Q.clone()) for adapter in self.adapters]
        if self.frozen:
            for adapter in self.adapters:
                last = min(adapter.drawn, adapter.rank) - 1
                for grad in (adapter.P.grad.T if adapter.P.grad is not None else None, adapter.Q.grad):
                    if grad is not None:
                        grad[:last] = 0

    @torch.no_grad()
    def after_step(self, step: int, frozen: bool) -> None:
        if not self._copies:  # a step whose gradients were not finite was not looked at
            return
        for adapter, (p, q) in zip(self.adapters, self._copies, strict=True):
            end = min(adapter.drawn, adapter.rank)
            still = [slice(end, None), *([slice(0, max(0, end - 1))] if self.frozen else [])]
            for part in still:
                adapter.P[:, part] = p[:, part]
                adapter.Q[part] = q[part]
        self._copies = []

    @torch.no_grad()
    def allocated(
        self, before: Sequence[torch.Tensor], step: int, optimizer: torch.optim.Optimizer | None
    ) -> None:
        for adapter in self.adapters:
            adapter.lam.copy_(adapter.kept * adapter.stretch(adapter.live_rank))

    def end(self) -> None:
        for adapter in self.adapters:
            adapter.drawn = 0
