"""RankController: score → budget → allocate → apply, in that order, for any training loop.

It knows no framework. :class:`rankalloc.training.callback.RankCallback` is the same thing driven by
transformers' Trainer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adapters.adapter_set import Adapters
from ..budget import BudgetPlan, RankBudget
from ..errors import NotAdaptedError
from ..methods import Method
from ..methods.scores import Score
from ..trace import TRACE_NAME, LogRecord, RankTrace
from . import allocation, averages, resuming, sharding
from .checks import all_finite, hasty, never_reached
from .clock import StepClock
from .first_step import require_usable, require_whole_gradients
from .recording import close_trace, new_trace
from .regularizer import add_orthogonal_gradient
from .run_state import RunState
from .settings import settle
from .subspace_penalty import SubspacePenalty, penalty_of
from .subspaces import Given


class RankController:
    """Chooses the ranks of ``adapters`` so that they meet ``budget``, and records the trace.

    Each step: ``loss.backward()``, :meth:`observe`, ``optimizer.step()``, :meth:`update`,
    ``optimizer.zero_grad()``; at the end :meth:`finish`. Clip gradients before ``observe``.

    Args:
        adapters: from :func:`rankalloc.attach`.
        budget: what may be spent, and its course.
        total_steps: optimizer steps of the whole run.
        method: a key of ``rankalloc.METHODS``.
        shrink: when dropped triplets leave memory and the optimizer's state. "events": at every allocation,
            for good. "freeze": when ranks are final; until then one may come back. True: the method's own choice.
            False: never; shapes stay, and dropped triplets are held at zero.
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
        away_from: Given | Sequence[Given] | SubspacePenalty | None = None,
        away_weight: float | None = None,
        away_side: str | None = None,
        **options: Any,
    ) -> None:
        settings = settle(adapters, budget, total_steps, method, shrink=shrink, seed=seed, options=options)
        sharding.prepare(adapters)
        self.away = penalty_of(adapters, away_from, away_weight, away_side)
        score = settings.new_score(list(adapters))
        trace = new_trace(
            adapters, settings.method.name, settings.recorded, settings.budget, settings.schedule, seed,
            score.state_bytes() if score is not None else 0,
        )
        if self.away is not None:
            trace.method_options |= self.away.record()
            trace.alerts += self.away.notes
        trace.alerts += hasty(settings.schedule, settings.method)
        self.settings = settings
        self.state = RunState(adapters, settings, settings.schedule, settings.new_rule(list(adapters)), score, trace)
        self.clock = StepClock()
        self._observed = False
        adapters.adaptation = self
        adapters.nested, adapters.nested_exponent = self.state.rule.nested, self.state.rule.nested_exponent
        if fresh:
            allocation.begin(self.state)

    @property
    def adapters(self) -> Adapters:
        """Whose ranks are chosen."""
        return self.state.adapters

    @property
    def method(self) -> Method:
        """How ranks are chosen."""
        return self.settings.method

    @property
    def budget(self) -> RankBudget:
        """What may be spent; restated as what the adapters hold where ranks were chosen before training."""
        return self.settings.budget

    @property
    def score(self) -> Score | None:
        """What triplets are worth; None for a method without a score, and once ranks are final."""
        return self.state.score

    @property
    def schedule(self) -> BudgetPlan:
        """The budget resolved for these layers and steps."""
        return self.state.schedule

    plan = schedule  # its name in 0.1

    @property
    def trace(self) -> RankTrace:
        """The record of the run so far."""
        return self.state.trace

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.state.step

    @property
    def frozen(self) -> bool:
        """Whether ranks are final."""
        return self.state.frozen

    def check_adapted(self) -> None:
        """Raise NotAdaptedError when :meth:`update` was never called."""
        if self.step == 0:
            raise NotAdaptedError(
                f"ranks were to be chosen by {self.settings.method.name!r} and never were: call controller.observe() "
                "after backward and controller.update(optimizer) after every optimizer step, or give the Trainer a "
                "RankCallback"
            )

    def follow(self, averaged: nn.Module) -> Adapters:
        """Let the triplets of an average of the weights (torch's AveragedModel: EMA, SWA) leave with the model's own.

        Call it before training begins, or before it is resumed; :mod:`rankalloc.training.averages` tells how the
        average follows.

        Args:
            averaged: made from the adapted model; its parameters are a deep copy of the model's.

        Returns:
            The average's adapters, to be saved, merged or evaluated.

        Raises:
            RankallocError: it holds no copy of these adapters, or other ranks.
        """
        copies = averages.copy_of(self.adapters, averaged)
        for known in self.state.averages:
            if next(iter(known)).P is next(iter(copies)).P:
                return known
        self.state.averages.append(copies)
        if self.state.rule.pins_dropped:
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
            require_whole_gradients(self.adapters)
        if not self._gradients_arrived():
            return
        if self.state.idle:
            self.state.see_gradients()
        if not all_finite([p.grad for p in self.adapters.parameters() if p.grad is not None]):
            self.trace.nonfinite_steps.append(self.step + 1)
            return
        settings, score = self.settings, self.state.score
        if settings.orthogonal:
            live_only = self.frozen and settings.shrink is False
            add_orthogonal_gradient(list(self.adapters), settings.orthogonal, live_only=live_only)
        if score is not None and not self.frozen and not settings.score_after_step:
            score.observe()
        if self.away is not None:
            if self.step == 0:
                self.log(0, {"away_share": self.away.share()})
            self.away.add_gradient()
        self.state.rule.before_step(self.step + 1)

    def _gradients_arrived(self) -> bool:
        """Whether there is anything to observe; False only when no triplet is left."""
        if any(p.grad is not None for a in self.adapters for p in a.trained()):
            return True
        if not any(a.rank for a in self.adapters):
            return False
        raise NotAdaptedError(
            "no adapter received a gradient. Call observe() after backward and before zero_grad(); with reentrant "
            "gradient checkpointing call model.enable_input_require_grads() or use use_reentrant=False"
        )

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count one optimizer step and allocate where the schedule asks for it; call it after the optimizer's step.

        Args:
            optimizer: the one that trains the adapters; needed when ranks leave memory (``shrink``).

        Raises:
            NotAdaptedError: :meth:`observe` was not called for this step, or the optimizer does not
                hold the adapters.
            RankallocError: the optimizer's state cannot follow what the method does.
        """
        if not self._observed:
            raise NotAdaptedError(
                "controller.update() was called without observe() for this step; call observe() after backward and "
                "before optimizer.step()"
            )
        self._observed = False
        state, rule, settings = self.state, self.state.rule, self.settings
        if not self.clock.started:
            require_usable(optimizer, state)
        state.step += 1
        if settings.score_after_step and state.score is not None and self._scorable():
            state.score.observe()
        after_freeze = self.step > self.schedule.freeze_step
        self.clock.step(after_freeze)
        rule.after_step(self.step, after_freeze)
        if rule.allocates(self.step):
            allocation.allocate(state, self.step, optimizer)
        elif rule.pins_dropped or (self.frozen and settings.shrink is False):
            for adapter in self.adapters:
                adapter.drop(adapter.kept, erase=rule.pins_dropped)  # momentum still moves what no gradient reaches
            averages.drop(state.averages, self.adapters, None, rule.pins_dropped)
        rule.prepare(self.step + 1)

    def finish(
        self, path: str | os.PathLike | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> RankTrace:
        """End the run: final singular values and sizes into the trace, which is returned.

        A run that stopped before its freeze is brought to its budget now, with an alert in the trace.

        Args:
            path: where to write the trace as JSON; a folder means trace.json in it.
            optimizer: needed only when the run stopped early and ranks are to leave memory.

        Raises:
            NotAdaptedError: :meth:`update` was never called.
        """
        self.check_adapted()
        if not self.frozen:
            self.trace.alerts.append(
                f"training ended after step {self.step}, before the freeze at step {self.schedule.freeze_step}; the "
                "ranks were brought to the budget at once, without training afterwards"
            )
            allocation.allocate(self.state, self.schedule.freeze_step, optimizer)
        self.state.rule.end()
        self.trace.alerts += never_reached(self.state.idle, self.adapters, chosen=self.method.when == "during")
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
        """Add a point to the trace's curves; values that are not finite numbers are left out."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, Real) and not isinstance(v, bool)}
        numbers = {k: v for k, v in numbers.items() if np.isfinite(v)}
        if numbers:
            self.trace.logs.append(LogRecord(step=step, values=numbers))

    def state_dict(self) -> dict[str, Any]:
        """All that an interrupted run needs to continue: {"tensors": {name: tensor}, "meta": JSON text}.

        The adapters' weights are part of the model's state; here is a hash of them.
        """
        self.count_time()
        return resuming.state_of(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; load the model's weights first.

        Raises:
            RankallocError: the state is damaged, or of another budget, method, run length or model;
                nothing has been changed then.
        """
        resuming.restore(self.state, state)
        self.clock.restart()

    def new_score(self) -> Score | None:
        """The method's score over the adapters as they are now, with empty state."""
        return self.state.new_score()

    def count_time(self) -> None:
        """Add the time since the last count to the trace's wall time."""
        self.trace.wall_seconds = (self.trace.wall_seconds or 0.0) + self.clock.lap()

    def _scorable(self) -> bool:
        """Whether PEFT would score after this step: it no longer does at the freeze itself."""
        return self.step < self.schedule.freeze_step and self.step not in self.trace.nonfinite_steps[-1:]
