"""RankController: score → budget → allocate → apply, in that order, for any training loop.

It knows no framework. :class:`rankalloc.training.callback.RankCallback` is the same thing driven by
transformers' Trainer.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adapters import memory, optimizer_state
from ..adapters.adapter_set import Adapters
from ..adapters.plan import budget_after
from ..budget import RankBudget
from ..errors import ConfigError, NotAdaptedError, unknown
from ..methods import PLACEMENTS, find_method
from ..methods.allocators import ALLOCATORS
from ..methods.requirements import basis_of, require_trainable
from ..methods.rules import RULES
from ..methods.scores import SCORES, Score
from ..options import flag
from ..trace import TRACE_NAME, LogRecord, RankTrace
from . import allocation, averages, resuming, sharding
from .checks import all_finite, check_spendable
from .clock import StepClock
from .recording import close_trace, new_trace
from .regularizer import add_orthogonal_gradient
from .subspace_penalty import penalty_of
from .subspaces import Given


class RankController:
    """Chooses the ranks of ``adapters`` so that they meet ``budget``, and keeps the trace.

    Each step: ``loss.backward()``, :meth:`observe`, ``optimizer.step()``, :meth:`update`,
    ``optimizer.zero_grad()``; at the end :meth:`finish`. Clip gradients before ``observe``.

    Args:
        adapters: from :func:`rankalloc.attach`.
        budget: what may be spent, and its course.
        total_steps: optimizer steps of the whole run.
        method: a key of ``rankalloc.METHODS``.
        shrink: when dropped triplets leave memory and the optimizer's state: "events" at every allocation,
            for good; "freeze" when ranks are final, so that until then one may come back; True what the
            method does by itself; False never: shapes stay, dropped triplets are held at zero.
        seed: of what the method draws; noted in the trace.
        fresh: False when the adapters come from a checkpoint whose state :meth:`load_state_dict` will be
            given, so that a method that prepares its adapters leaves them as they are.
        away_from, away_weight, away_side: finished adapters whose subspaces are kept out of, and how; see
            :class:`rankalloc.training.subspace_penalty.SubspacePenalty`.
        options: the method's own options (``rankalloc ls methods``).

    Raises:
        BudgetError: the budget does not fit the adapters.
        ConfigError: unknown method or option; nothing to keep away from.
        AdapterFileError: an adapter of ``away_from`` is damaged or of another base.
        NotAdaptedError: the method chooses ranks before training, and that was not done.

    Example:
        >>> import torch, rankalloc as ra
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        >>> adapters = ra.attach(model, rank=4)
        >>> optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
        >>> controller = ra.RankController(adapters, ra.RankBudget(ranks=3), total_steps=20)
        >>> for step in range(20):
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     controller.observe()
        ...     optimizer.step()
        ...     controller.update(optimizer)
        ...     optimizer.zero_grad()
        >>> trace = controller.finish()
        >>> sum(adapters.ranks().values())
        3
    """

    def __init__(
        self,
        adapters: Adapters,
        budget: RankBudget,
        total_steps: int,
        method: str = "auto",
        *,
        shrink: bool | str = True,
        seed: int | None = None,
        fresh: bool = True,
        away_from: Given | Sequence[Given] | None = None,
        away_weight: float | None = None,
        away_side: str | None = None,
        **options: Any,
    ) -> None:
        self.adapters = adapters
        self.method = find_method(method)
        strangers = [name for name in options if name not in self.method.options]
        if strangers:
            raise ConfigError(unknown(f"option of method {method!r}:", strangers[0], self.method.options or ["none"]))
        require_trainable(self.method, adapters.init)
        sharding.prepare(adapters)
        self.canonical, self.orthogonal = basis_of(self.method, adapters.init, options)
        self.score_after_step = flag("score_after_step", options.pop("score_after_step", False))
        self.placement = options.pop("placement", "chosen")
        if self.placement not in PLACEMENTS:
            raise ConfigError(unknown("placement", self.placement, PLACEMENTS))
        self.seed = seed or 0
        self.budget = budget if self.method.planner is None else budget_after(adapters, budget, self.method)
        # of the ranks at the start: weights loaded from a checkpoint may have been shrunk already
        shapes = [replace(s, rank=a.initial_rank) for s, a in zip(adapters.shapes(), adapters, strict=True)]
        self.plan = self.budget.resolve(shapes, total_steps, adapters.bytes_per_param())
        check_spendable(self.plan, adapters)
        rule = RULES[self.method.rule]
        of_rule = {name: options[name] for name in set(options) & set(inspect.signature(rule).parameters)}
        of_score = {name: value for name, value in options.items() if name not in of_rule}
        self.rule = rule(list(adapters), self.plan, self.seed, **of_rule)
        self._of_score = of_score
        self.score = self.new_score()
        self.allocate = ALLOCATORS[self.method.allocator if self.placement == "chosen" else self.placement]
        rooms = self.method.rule != "shrink" or self.placement == "shuffled"  # what must not leave before the freeze
        self.shrink = ("freeze" if rooms else self.method.shrinks) if shrink is True else shrink
        if self.shrink not in ("events", "freeze", False):
            raise ConfigError(f'shrink takes True, False, "events" or "freeze", got {shrink!r}')
        if self.shrink == "events" and rooms:
            raise ConfigError(
                f"method {method!r}, placement {self.placement!r}, needs the room of dropped ranks until the freeze; "
                'use shrink="freeze"'
            )
        self.away = penalty_of(adapters, away_from, away_weight, away_side)
        self.step = 0
        self._observed = False
        self.averages: list[Adapters] = []
        self.clock = StepClock()
        effective = {
            "canonical": self.canonical, "orthogonal": self.orthogonal, "placement": self.placement,
            "shrink": self.shrink,
        }
        if self.score_after_step:
            effective["score_after_step"] = True
        self.trace = new_trace(
            adapters, self.method.name, options | (effective if self.method.options else {}), self.budget,
            self.plan, seed, self.score.state_bytes() if self.score is not None else 0,
        )
        if self.away is not None:
            self.trace.method_options |= self.away.record()
            self.trace.alerts += self.away.notes
        adapters.adaptation = self
        adapters.nested = self.rule.nested
        if fresh:
            allocation.begin(self)

    @property
    def frozen(self) -> bool:
        """Whether ranks are final."""
        return self.trace.finished or self.step >= self.plan.freeze_step

    def check_adapted(self) -> None:
        """Raise NotAdaptedError when :meth:`update` was never called."""
        if self.step == 0:
            raise NotAdaptedError(
                f"ranks were to be chosen by {self.method.name!r} and never were: call controller.observe() after "
                "backward and controller.update(optimizer) after every optimizer step, or give the Trainer a "
                "RankCallback"
            )

    def follow(self, averaged: nn.Module) -> Adapters:
        """Let the triplets of an average of the weights (torch's AveragedModel: EMA, SWA) leave with the model's own.

        Call it before training, or where training goes on; how the average follows is in
        :mod:`rankalloc.training.averages`.

        Args:
            averaged: made from the adapted model; its parameters are a deep copy of the model's.

        Returns:
            The average's adapters, to be saved, merged or evaluated.

        Raises:
            RankallocError: it holds no copy of these adapters, or other ranks.
        """
        copies = averages.copy_of(self.adapters, averaged)
        for known in self.averages:
            if next(iter(known)) is next(iter(copies)):
                return known
        self.averages.append(copies)
        if self.rule.holds:
            averages.drop([copies], self.adapters, None, True)
        return copies

    @torch.no_grad()
    def observe(self) -> None:
        """Take in this step's gradients: after backward (and clipping), before the optimizer's step.

        A step with a gradient that is not finite is left out of the scores and counted in the
        trace. Adds the method's regulariser, and the penalty of ``away_from``, to the gradients.

        Raises:
            NotAdaptedError: no adapter has a gradient.
        """
        self._observed = True
        if not self.clock.started:
            sharding.check(self.adapters)
        grads = [p.grad for p in self.adapters.parameters() if p.grad is not None]
        if not any(p.grad is not None for a in self.adapters for p in (a.P, a.lam, a.Q)):
            if not any(a.rank for a in self.adapters):
                return
            raise NotAdaptedError(
                "no adapter received a gradient. Call observe() after backward and before zero_grad(); with reentrant "
                "gradient checkpointing call model.enable_input_require_grads() or use use_reentrant=False"
            )
        if not all_finite(grads):
            self.trace.nonfinite_steps.append(self.step + 1)
            return
        if self.orthogonal:
            held = self.frozen and self.shrink is False
            add_orthogonal_gradient(list(self.adapters), self.orthogonal, live_only=held)
        if self.score is not None and not self.frozen and not self.score_after_step:
            self.score.observe()
        if self.away is not None:
            if self.step == 0:
                self.log(0, {"away_share": self.away.share()})
            self.away.add_gradient()
        self.rule.before_step(self.step + 1)

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count one optimizer step and, where the schedule says so, allocate: after the optimizer's step.

        Args:
            optimizer: the one that trains the adapters; needed when ranks leave memory (``shrink``).

        Raises:
            NotAdaptedError: :meth:`observe` was not called for this step, or the optimizer does not
                hold the adapters.
        """
        if not self._observed:
            raise NotAdaptedError(
                "controller.update() was called without observe() for this step; call observe() after backward and "
                "before optimizer.step()"
            )
        self._observed = False
        if not self.clock.started:
            memory.check(self.adapters, optimizer, bool(self.shrink))
            if self.canonical:
                optimizer_state.check(self.adapters, optimizer)
            if not self.frozen:
                averages.check_told(self.adapters, self.averages)
        self.step += 1
        if self.score_after_step and self.score is not None and self._scorable():
            self.score.observe()
        self.clock.step(self.step > self.plan.freeze_step)
        self.rule.after_step(self.step, self.step > self.plan.freeze_step)
        if self.rule.allocates(self.step):
            allocation.allocate(self, self.step, optimizer)
        elif self.rule.holds or (self.frozen and self.shrink is False):
            for adapter in self.adapters:
                adapter.drop(adapter.kept, erase=self.rule.holds)  # momentum still moves what no gradient reaches
            averages.drop(self.averages, self.adapters, None, self.rule.holds)
        self.rule.prepare(self.step + 1)

    def finish(
        self, path: str | os.PathLike | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> RankTrace:
        """End the run: final singular values and sizes into the trace, which is returned.

        A run that stopped before its freeze is brought to its budget now, and the trace says so.

        Args:
            path: where to write the trace as JSON; a folder means trace.json in it.
            optimizer: needed only when the run stopped early and ranks are to leave memory.

        Raises:
            NotAdaptedError: :meth:`update` was never called.
        """
        self.check_adapted()
        if not self.frozen:
            self.trace.alerts.append(
                f"training ended after step {self.step}, before the freeze at step {self.plan.freeze_step}; the ranks "
                "were brought to the budget at once, without training afterwards"
            )
            allocation.allocate(self, self.plan.freeze_step, optimizer)
        self.rule.end()
        if self.away is not None:
            self.log(self.step, {"away_share": self.away.share()})
        self.count_time()
        close_trace(self.trace, self.adapters, self.step)
        self.trace.step_seconds_before_freeze = self.clock.median(frozen=False)
        self.trace.step_seconds_after_freeze = self.clock.median(frozen=True)
        if path is not None:
            path = Path(path)
            self.trace.save(path / TRACE_NAME if path.is_dir() or not path.suffix else path)
        return self.trace

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Add a point to the trace's curves; what is no finite number is left out."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, Real) and not isinstance(v, bool)}
        numbers = {k: v for k, v in numbers.items() if np.isfinite(v)}
        if numbers:
            self.trace.logs.append(LogRecord(step=step, values=numbers))

    def state_dict(self) -> dict[str, Any]:
        """All that an interrupted run needs to go on: {"tensors": {name: tensor}, "meta": JSON text}.

        The adapters' own weights are the model's and not in it; a fingerprint of them is.
        """
        return resuming.state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` left off; load the model's weights first.

        Raises:
            RankallocError: the state is damaged, or of another budget, method, run length or model;
                nothing has been changed then.
        """
        resuming.restore(self, state)

    def new_score(self) -> Score | None:
        """The method's score over the adapters as they are now, with empty state."""
        return SCORES[self.method.score](list(self.adapters), **self._of_score) if self.method.score else None

    def count_time(self) -> None:
        """Add the time since the last count to the trace's wall time."""
        self.trace.wall_seconds = (self.trace.wall_seconds or 0.0) + self.clock.lap()

    def _scorable(self) -> bool:
        """Whether PEFT would score after this step: it no longer does at the freeze itself."""
        return self.step < self.plan.freeze_step and self.step not in self.trace.nonfinite_steps[-1:]
