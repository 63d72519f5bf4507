"""RankController: score → budget → allocate → apply, in that order, for any training loop.

It knows no framework. :class:`rankalloc.callback.RankCallback` is the same thing driven by
transformers' Trainer.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from dataclasses import asdict, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import compact
from .adapters import Adapters
from .allocators import ALLOCATORS, Demand
from .budget import RankBudget
from .environment import describe
from .errors import BudgetError, ConfigError, NotAdaptedError, RankallocError, unknown
from .methods import find_method
from .regularizer import add_orthogonal_gradient
from .scores import SCORES
from .trace import AllocationRecord, BudgetRecord, LogRecord, RankTrace, ScoreRecord

STATE_VERSION = 1


class RankController:
    """Chooses the ranks of ``adapters`` so that they meet ``budget``, and keeps the trace.

    Each step: ``loss.backward()``, :meth:`observe`, ``optimizer.step()``, :meth:`update`,
    ``optimizer.zero_grad()``; at the end :meth:`finish`. Clip gradients before ``observe``.

    Args:
        adapters: from :func:`rankalloc.attach`.
        budget: what may be spent, and its course.
        total_steps: optimizer steps of the whole run.
        method: a key of ``rankalloc.METHODS``.
        shrink: at the freeze, take dropped triplets out of memory and of the optimizer's state.
            False keeps every shape and holds dropped triplets at zero instead.
        seed: noted in the trace.
        options: the method's own options (``rankalloc ls methods``).

    Raises:
        BudgetError: the budget does not fit the adapters.
        ConfigError: unknown method or option.

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
        method: str = "adalora",
        *,
        shrink: bool = True,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        self.adapters = adapters
        self.method = find_method(method)
        strangers = [name for name in options if name not in self.method.options]
        if strangers:
            raise ConfigError(unknown(f"option of method {method!r}:", strangers[0], self.method.options or ["none"]))
        if adapters.init == "lora" and "orthogonal" in self.method.options:
            raise ConfigError(
                f"method {method!r} needs adapters with a trained Λ; these were attached with init='lora'"
            )
        self.orthogonal = float(options.pop("orthogonal", self.method.orthogonal))
        self.budget = budget
        # of the ranks at the start: weights loaded from a checkpoint may have been shrunk already
        shapes = [replace(s, rank=a.initial_rank) for s, a in zip(adapters.shapes(), adapters, strict=True)]
        self.plan = budget.resolve(shapes, total_steps, adapters.bytes_per_param())
        unspent = self.plan.target - self.plan.spent([a.rank for a in adapters])
        open_costs = [c for c, a, cap in zip(self.plan.costs, adapters, self.plan.caps, strict=True) if a.rank < cap]
        if open_costs and unspent >= min(open_costs) * self.plan.multiple_of:
            raise BudgetError(
                f"the budget of {self.plan.target:,} {self.plan.unit} is {unspent:,} above what these adapters still "
                "hold after ranks were removed; lower it, or attach anew"
            )
        self.score = SCORES[self.method.score](list(adapters), **options) if self.method.score else None
        self.allocate = ALLOCATORS[self.method.allocator]
        self.shrink = shrink
        self.step = 0
        self._observed = False
        self._started = time.perf_counter()
        self._last_update: float | None = None
        self._durations: dict[bool, list[float]] = {False: [], True: []}
        self.trace = self._new_trace(seed, {**options, "orthogonal": self.orthogonal} if self.orthogonal else options)
        adapters.adaptation = self

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

    @torch.no_grad()
    def observe(self) -> None:
        """Take in this step's gradients: after backward (and clipping), before the optimizer's step.

        A step with a gradient that is not finite is left out of the scores and counted in the
        trace. Adds the method's regulariser to the gradients.

        Raises:
            NotAdaptedError: no adapter has a gradient.
        """
        self._observed = True
        grads = [p.grad for p in self.adapters.parameters() if p.grad is not None]
        if not any(p.grad is not None for a in self.adapters for p in (a.P, a.lam, a.Q)):
            if not any(a.rank for a in self.adapters):
                return
            raise NotAdaptedError(
                "no adapter received a gradient. Call observe() after backward and before zero_grad(); with reentrant "
                "gradient checkpointing call model.enable_input_require_grads() or use use_reentrant=False"
            )
        norms = torch.stack([norm.float().to(grads[0].device) for norm in torch._foreach_norm(grads)])
        if not torch.isfinite(norms).all():
            self.trace.nonfinite_steps.append(self.step + 1)
            return
        if self.orthogonal:
            add_orthogonal_gradient(list(self.adapters), self.orthogonal, live_only=self.frozen and not self.shrink)
        if self.score is not None and not self.frozen:
            self.score.observe()

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
        if self._last_update is None:
            compact.check(self.adapters, optimizer, self.shrink)
        self.step += 1
        self._clock()
        if self.plan.allocates(self.step):
            self._allocate(self.step, optimizer)
        elif self.frozen and not self.shrink:
            for adapter in self.adapters:
                adapter.drop(adapter.kept)  # momentum still moves what no gradient reaches

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
            self._allocate(self.plan.freeze_step, optimizer, at_step=self.step)
        self._count_time()
        trace = self.trace
        trace.steps_done = self.step
        broken = [n for n, a in self.adapters.modules.items() if not torch.isfinite(a.delta_weight()).all()]
        if broken:
            trace.alerts.append(
                f"the weights of {broken[0]} ({len(broken)} adapters in all) are not finite: training diverged; lower "
                "the learning rate, or clip the gradients"
            )
        else:
            trace.singular_values = [values.tolist() for values in self.adapters.singular_values().values()]
        trace.adapter_params_final = self.adapters.num_params()
        trace.step_seconds_before_freeze = _median(self._durations[False])
        trace.step_seconds_after_freeze = _median(self._durations[True])
        trace.finished = True
        if path is not None:
            path = Path(path)
            trace.save(path / "trace.json" if path.is_dir() or not path.suffix else path)
        return trace

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Add a point to the trace's curves; what is no finite number is left out."""
        numbers = {
            k: float(v) for k, v in values.items() if isinstance(v, Real) and not isinstance(v, bool)
        }
        numbers = {k: v for k, v in numbers.items() if np.isfinite(v)}
        if numbers:
            self.trace.logs.append(LogRecord(step=step, values=numbers))

    def state_dict(self) -> dict[str, Any]:
        """All that an interrupted run needs to go on: {"tensors": {name: tensor}, "meta": JSON text}.

        The adapters' own weights are the model's and not in it; a fingerprint of them is.
        """
        self._count_time()
        meta = {
            "version": STATE_VERSION, "step": self.step, "method": self.method.name, "plan": _plain(asdict(self.plan)),
            "initial_ranks": [layer.initial_rank for layer in self.trace.layers], "weights": self._weights_key(),
            "trace": self.trace.model_dump(mode="json"),
        }
        tensors = self.score.tensors() if self.score is not None and not self.frozen else {}
        return {"tensors": dict(tensors), "meta": json.dumps(meta)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` left off; load the model's weights first.

        Raises:
            RankallocError: the state is of another budget, method, run length or model.
        """
        try:
            meta = json.loads(state["meta"])
        except ValueError as error:
            raise RankallocError(f"cannot resume: the rank state is damaged ({error})") from None
        if meta.get("version") != STATE_VERSION:
            raise RankallocError(f"rank state of version {meta.get('version')!r}; this rankalloc reads {STATE_VERSION}")
        if meta["method"] != self.method.name:
            raise RankallocError(
                f"cannot resume: the run began with method {meta['method']!r} and now has {self.method.name!r}"
            )
        if len(meta["initial_ranks"]) != len(self.adapters):
            raise RankallocError(
                f"cannot resume: the rank state is of {len(meta['initial_ranks'])} layers and this model has "
                f"{len(self.adapters)} adapted ones"
            )
        shapes = [replace(s, rank=r) for s, r in zip(self.adapters.shapes(), meta["initial_ranks"], strict=True)]
        plan = self.budget.resolve(shapes, self.plan.total_steps, self.adapters.bytes_per_param())
        now = _plain(asdict(plan))
        trace = RankTrace.model_validate(meta["trace"])
        then = {**meta["plan"], **trace.method_options, "scaling": trace.scaling}
        now |= {**self.trace.method_options, "scaling": self.trace.scaling}
        changed = [
            f"{key} was {then.get(key, 'its default')} and now is {now.get(key, 'its default')}"
            for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key)
        ]
        if changed:
            raise RankallocError(f"cannot resume with other settings than the run began with: {'; '.join(changed)}")
        if meta["weights"] != self._weights_key():
            raise RankallocError(
                "cannot resume: the model's adapter weights are not those the rank state was saved with; resume from "
                "the folder that holds both"
            )
        if self.score is not None and meta["step"] < plan.freeze_step:
            needed = {name: tensor.shape for name, tensor in self.score.tensors().items()}
            saved = state["tensors"]
            unfit = [name for name, shape in needed.items() if name not in saved or saved[name].shape != shape]
            if unfit:
                raise RankallocError(f"cannot resume: the rank state lacks {unfit[0]} in the shape these adapters need")
            self.score.load_tensors(state["tensors"])
        self.plan, self.step, self.trace = plan, meta["step"], trace
        self._started = time.perf_counter()

    def _allocate(self, step: int, optimizer: torch.optim.Optimizer | None, at_step: int | None = None) -> None:
        values = self._score_values()
        demand = Demand.at(self.plan, step)
        kept = self.allocate(values, demand)
        was = np.concatenate([adapter.kept.cpu().numpy() for adapter in self.adapters])
        for adapter, mask in zip(self.adapters, kept, strict=True):
            adapter.drop(torch.from_numpy(mask))
        ranks = [int(mask.sum()) for mask in kept]
        flat, flat_kept = np.concatenate(values), np.concatenate(kept)
        scored = self.score is not None
        self.trace.allocations.append(AllocationRecord(
            step=step if at_step is None else at_step, asked=demand.amount, reached=self.plan.spent(ranks), ranks=ranks,
            lowest_kept=float(flat[flat_kept].min()) if scored and flat_kept.any() else None,
            highest_dropped=float(flat[~flat_kept].max()) if scored and not flat_kept.all() else None,
            dropped=int((was & ~flat_kept).sum()), returned=int((~was & flat_kept).sum()),
        ))
        if step == self.plan.freeze_step:
            if scored:
                self.trace.scores = ScoreRecord(
                    score=self.method.score, step=self.trace.allocations[-1].step,
                    kept=[np.sort(v[m])[::-1].tolist() for v, m in zip(values, kept, strict=True)],
                    dropped=[np.sort(v[~m])[::-1].tolist() for v, m in zip(values, kept, strict=True)],
                )
            if self.shrink and optimizer is not None:
                compact.shrink(self.adapters, optimizer)

    def _score_values(self) -> list[np.ndarray]:
        if self.score is None:
            return [np.zeros(adapter.rank) for adapter in self.adapters]
        values = self.score.values()
        joined = torch.cat([v.float() for v in values]).cpu().double().numpy()  # the one synchronisation
        by_layer = np.split(joined, np.cumsum([len(v) for v in values])[:-1])
        for name, layer in zip(self.adapters.modules, by_layer, strict=True):
            if not np.isfinite(layer).all():
                raise RankallocError(
                    f"the scores of {name} are not finite at step {self.step}: its adapter has diverged; lower the "
                    "learning rate, or clip the gradients (max_grad_norm)"
                )
        return by_layer

    def _clock(self) -> None:
        now = time.perf_counter()
        if self._last_update is not None:
            self._durations[self.step > self.plan.freeze_step].append(now - self._last_update)
        self._last_update = now

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.trace.wall_seconds = (self.trace.wall_seconds or 0.0) + now - self._started
        self._started = now

    def _weights_key(self) -> str:
        digest = hashlib.sha256()
        for name, adapter in self.adapters.modules.items():
            digest.update(name.encode())
            digest.update(adapter.lam.detach().float().cpu().numpy().tobytes())
            digest.update(adapter.kept.cpu().numpy().tobytes())
        return digest.hexdigest()

    def _new_trace(self, seed: int | None, options: dict[str, Any]) -> RankTrace:
        adapters, plan = self.adapters, self.plan
        return RankTrace(
            method=self.method.name, method_options=options, seed=seed, alpha=adapters.alpha, rank=adapters.rank,
            scaling=adapters.scaling, layers=adapters.layer_records(), heads=adapters.head_params(),
            budget=BudgetRecord(
                given=self.budget.given, unit=plan.unit, target=plan.target, initial=plan.initial,
                min_rank=self.budget.min_rank, max_rank=self.budget.max_rank, multiple_of=plan.multiple_of,
                shape=plan.shape, total_steps=plan.total_steps, warmup_steps=plan.warmup_steps,
                freeze_step=plan.freeze_step, allocate_every=plan.every,
            ),
            adapter_params_initial=adapters.num_params(),
            allocator_state_bytes=self.score.state_bytes() if self.score is not None else 0,
            environment=describe(next(iter(adapters)).P.device.type),
        )


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """``value`` as it reads back from JSON."""
    return json.loads(json.dumps(value))


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
