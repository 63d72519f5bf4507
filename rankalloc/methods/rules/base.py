"""The interface of rules: how ranks move around the optimizer's steps. The plain rule only shrinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from ...adapters.triplets import Triplets
from ...budget import BudgetPlan

Arrays = list[np.ndarray]


class Rule:
    """The plain rule: all triplets train, and those that an allocation drops have their λ set to zero. They
    keep P and Q, so they may grow back until the freeze (AdaLoRA's masking, arXiv 2303.10512).

    A new rule is one file with a subclass and one line in ``rankalloc.methods.rules.RULES``. A rule keeps nothing
    between two steps: whatever it draws comes from ``seed`` and the step, so that a resumed run equals an
    uninterrupted one.

    Args:
        adapters: those whose ranks are chosen.
        plan: the budget, resolved for them.
        seed: of everything the rule draws.
    """

    name: ClassVar[str] = "shrink"
    pins_dropped: ClassVar[bool] = False
    """Whether a dropped triplet stays at zero, P and Q included, until the rule puts a fresh one in its slot."""
    changes_forward: ClassVar[bool] = False
    """Whether it changes what adapters compute in a step, which layers of PEFT's cannot follow."""
    nested: ClassVar[bool] = False
    """Whether, for every b, the first b triplets are trained to be an adapter (:mod:`.nested`)."""
    nested_exponent: ClassVar[float | None] = None
    """e of the (r / b)^e that the first b of r triplets are then multiplied by; None for that of the scale, α / r^e."""

    def __init__(self, adapters: Sequence[Triplets], plan: BudgetPlan, seed: int = 0) -> None:
        self.adapters, self.plan, self.seed = list(adapters), plan, seed

    def asked(self, step: int) -> int:
        """The budget after optimizer step ``step`` in the plan's unit; step 0 is before the first one."""
        return self.plan.asked(step)

    def allocates(self, step: int) -> bool:
        """Whether ranks are allocated after optimizer step ``step``."""
        return self.plan.allocates(step)

    def begin(self) -> None:
        """Before the first forward pass of a run; not called when one is resumed."""

    def prepare(self, step: int) -> None:
        """Before the forward pass of optimizer step ``step``, counted from 1; also when a run is resumed."""

    def before_step(self, step: int) -> None:
        """After the backward pass of ``step``, before the optimizer's: gradients may be changed."""

    def after_step(self, step: int, frozen: bool) -> None:
        """After the optimizer's step ``step``; ``frozen`` once ranks are final."""

    def preferences(self, values: Arrays, live: Sequence[np.ndarray], step: int) -> Arrays:
        """What the allocator is given instead of the scores ``values``: per layer (r,), higher stays.
        ``live`` are the masks before this allocation; ``step`` is 0 at the start."""
        return values

    def end(self) -> None:
        """After the last step of a run."""

    def allocated(
        self, before: Sequence[torch.Tensor], step: int, optimizer: torch.optim.Optimizer | None
    ) -> None:
        """After the masks ``adapter.kept`` have been set; ``before`` are the previous ones."""
