"""RankCallback: a RankController driven by transformers' Trainer. It delegates and decides nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters.adapter_set import Adapters
from ..adapters.adopting import adopt
from ..adapters.plan import RankPlan
from ..budget import RankBudget
from ..errors import ConfigError, NotAdaptedError
from ..methods import find_method
from ..methods.planners.planning import first_batches
from ..methods.planners.probe import LossFn
from ..storage.trained_state import leave_base_out
from ..trace import TRACE_NAME, RankTrace
from .checkpoints import STATE_NAME, load_state, optimizer_at_end, require_whole, resumed_from, save_state
from .controller import RankController
from .other_model import is_inside, require_adoptable
from .past_the_end import empty_step, forget_step, is_past_the_end
from .planned import begin, plan_adapters, prepare_adapters
from .precision import AS_MADE, Precision, checked
from .settings import settle
from .subspace_penalty import OPTIONS, penalty_of
from .wrappers import refuse_data_parallel


class RankCallback(TrainerCallback):
    """Chooses ranks while a Trainer trains, transformers' own or one of TRL's.

    Without ``adapters`` it drives the LoRA layers of the Trainer's PeftModel (:func:`rankalloc.adopt`), so a script
    that has a LoraConfig needs one more line:

        callbacks=[ra.RankCallback(budget=ra.RankBudget(fraction=0.25))]

    Works with gradient accumulation, clipping, checkpoints and ``resume_from_checkpoint``. A checkpoint that is not
    whole is refused (:mod:`rankalloc.training.checkpoints`); a run whose ranks are final may be resumed for more steps.
    With ``load_best_model_at_end`` only checkpoints that meet the budget, those from the freeze on, compete; a run that
    stops earlier is brought to its budget from the best one there is. At the end the trace is written to ``trace.json``
    in the Trainer's output folder.

    With a method that chooses before training, adapters attached at their peak rank are planned when training
    begins, from the first batches of the Trainer's training data in the dataset's order; the other ranks leave
    memory before the first step. A run that is resumed keeps the ranks of its checkpoint.

    Attributes:
        past_the_end: whether every step had been trained when the run was resumed, so that the one the Trainer takes
            counts for nothing.

    Args:
        adapters: from :func:`rankalloc.attach` or :func:`rankalloc.adopt`, made before the Trainer's optimizer; None to
            adopt the LoRA layers of the Trainer's model when the Trainer is made, so pass the callback in its
            ``callbacks=``.
        budget: what may be spent.
        method: a key of ``rankalloc.METHODS``.
        resume_from: the checkpoint's folder, for a Trainer whose training loop is one of its own; that of
            ``trainer.train(resume_from_checkpoint=...)`` is found without.
        loss_fn: ``loss_fn(outputs, labels)`` to plan with, where the model gives no loss of its own.
        adapter_name: which adapter of the PeftModel to drive; None for the active one.
        dtype: of the adapters' weights while they train. TRL casts them to bfloat16 beside a quantised base, where
            small steps are lost; None leaves them so. By default float32, and for ``adapters`` of
            :func:`rankalloc.adopt` the format that it left them in.
        save_trace: False leaves writing :attr:`trace` to the caller, who adds to it first.
        options: further arguments of :class:`rankalloc.RankController`.

    Raises:
        NotAdaptedError: at the end of training, when the Trainer never called the hooks; at its beginning, when there
            are no adapters and the callback was added after the Trainer was made.
        TargetError: the Trainer's model has no LoRA layers that can be driven.

    Example:
        >>> import rankalloc as ra, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> callback = ra.RankCallback(ra.attach(model, rank=4), ra.RankBudget(ranks=2))
        >>> # trainer = Trainer(model, args, train_dataset=data, callbacks=[callback]); trainer.train()
    """

    def __init__(
        self,
        adapters: Adapters | None = None,
        budget: RankBudget | None = None,
        method: str = "auto",
        *,
        resume_from: str | os.PathLike | None = None,
        loss_fn: LossFn | None = None,
        adapter_name: str | None = None,
        dtype: torch.dtype | str | None = AS_MADE,
        save_trace: bool = True,
        **options: Any,
    ) -> None:
        if not isinstance(budget, RankBudget):
            raise ConfigError(
                f"RankCallback needs a budget, got {budget!r}: RankCallback(budget=rankalloc.RankBudget(fraction=0.25))"
            )
        find_method(method)
        self.budget = budget
        self.method = method
        self.resume_from = resume_from
        self.loss_fn = loss_fn
        self.adapter_name = adapter_name
        self.dtype = checked(dtype)
        self.save_trace = save_trace
        self.options = self._given = options
        self._adopts = adapters is None
        self.controller: RankController | None = None
        self._adapters: Adapters | None = None
        self.past_the_end = False
        self._epoch = 0.0
        self._precision: Precision | None = None
        if adapters is not None:
            self._take(adapters)  # fail now, not when training begins
            self._precision = Precision(adapters, self.dtype)

    @property
    def adapters(self) -> Adapters:
        """Whose ranks are chosen. Raises NotAdaptedError when there are none yet."""
        if self._adapters is None:
            raise NotAdaptedError(
                "this RankCallback has no adapters yet: it adopts the LoRA layers of a Trainer's model when that "
                "Trainer is made, so pass it in the Trainer's callbacks= (add_callback is too late), or give it the "
                "adapters that rankalloc.adopt(model) returns"
            )
        return self._adapters

    def _take(self, adapters: Adapters) -> None:
        """Choose the ranks of ``adapters``; raises what a run with them would."""
        options = self._given
        if find_method(self.method).planner is not None and adapters.plan is None:
            prepare_adapters(adapters, self.budget, self.method, **_planning(options))
        else:
            settings = {name: options[name] for name in ("shrink", "seed") if name in options}
            rest = {name: value for name, value in options.items() if name not in ("shrink", "seed", "fresh", *OPTIONS)}
            settle(adapters, self.budget, 1, self.method, **settings, options=rest)
        # subspaces cost a QR of every layer, so they are found once
        away = penalty_of(adapters, **{name: options[name] for name in OPTIONS if name in options})
        self.options = {name: value for name, value in options.items() if name not in OPTIONS} | {"away_from": away}
        self._adapters = adapters
        adapters.adaptation = self

    def on_init_end(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._adapters is None or (self._adopts and not is_inside(self._adapters, model)):
            self._adopt(model)
        elif self._precision is not None:
            self._precision.restore()

    def _adopt(self, model: Any) -> None:
        dtype = torch.float32 if isinstance(self.dtype, str) else self.dtype
        self._take(adopt(model, self.adapter_name, dtype=dtype))

    @property
    def trace(self) -> RankTrace:
        """The record of the run. Raises NotAdaptedError before training has begun."""
        self.check_adapted()
        return self._running.trace

    @property
    def _running(self) -> RankController:
        if self.controller is None:
            raise NotAdaptedError(
                "a RankCallback was made for these adapters and no training ran with it: pass it in the Trainer's "
                "callbacks= and call trainer.train()"
            )
        return self.controller

    def check_adapted(self) -> None:
        """Raise NotAdaptedError when no training step has run with this callback."""
        self._running.check_adapted()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if args.fp16 and not args.max_grad_norm:
            raise ConfigError(
                "fp16 without max_grad_norm leaves gradients scaled when ranks are scored; set it, or use bf16"
            )
        if model is not None and not is_inside(self.adapters, model):
            require_adoptable(self._adopts, state.global_step)
            self._adopt(model)
        refuse_data_parallel(self.adapters.model)  # the Trainer has wrapped the model by now
        options = {"seed": args.seed, "fresh": state.global_step == 0, **self.options}
        notes = self._plan(args, state, **kwargs)
        self.controller = RankController(self.adapters, self.budget, state.max_steps, self.method, **options)
        self.controller.trace.alerts += notes
        self.adapters.adaptation = self
        if state.global_step > 0:
            folder = resumed_from(self.resume_from, args, state)
            if folder.is_dir() and not (args.deepspeed or args.fsdp):  # whose files are others
                require_whole(folder, rank_state=False)
            load_state(self.controller, folder / STATE_NAME)
        self.past_the_end, self._epoch = is_past_the_end(state), state.epoch

    def _plan(
        self,
        args: TrainingArguments,
        state: TrainerState,
        train_dataloader: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> list[str]:
        """Choose ranks now, if the method does so before training and none are chosen yet; the plan's notes."""
        method, adapters = find_method(self.method), self.adapters
        if method.planner is None:
            return []
        if adapters.plan is None and state.global_step > 0:
            # the weights come from a checkpoint, and their sizes are the plan
            for adapter in adapters:
                adapter.initial_rank = adapter.rank
            adapters.plan = RankPlan(adapters.ranks(), method.name, adapters.init, adapters.rank, self.budget)
        elif adapters.plan is None:
            options = {"seed": args.seed, **_planning(self.options)}
            # from the dataset: going through the loader would move the Trainer's own order on
            loader = train_dataloader
            batches = first_batches(loader.dataset, loader.collate_fn, args.train_batch_size)
            plan = plan_adapters(adapters, batches, self.budget, self.method, loss_fn=self.loss_fn, **options)
            begin(adapters, plan, optimizer)
        return adapters.plan.notes if adapters.plan is not None else []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self.past_the_end:
            return empty_step(model, optimizer, scaled=args.fp16)
        self._running.observe()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        controller = self._running
        if self.past_the_end:
            return
        was_frozen = controller.frozen
        controller.update(optimizer)
        if controller.frozen and not was_frozen:
            # checkpoints from before the freeze do not meet the budget: the search for the best begins here
            state.best_metric = None
            state.best_global_step = None
            state.best_model_checkpoint = None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.past_the_end:
            forget_step(state, control, self._epoch)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.past_the_end:
            forget_step(state, control, self._epoch)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        # the summary after the last step is no point of a curve
        if self.controller is not None and "train_runtime" not in (logs or {}):
            self.controller.log(state.global_step, logs or {})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            leave_base_out(model, self.adapters.model, self.adapters.heads.values(), _checkpoint(args, state))
            save_state(self._running, _checkpoint(args, state) / STATE_NAME)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.check_adapted()
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        trace = self._running.finish(optimizer=optimizer_at_end(self._running, best, optimizer))
        if self.save_trace and state.is_world_process_zero:
            trace.save(_output(args) / TRACE_NAME)


def _output(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir))  # never None once the arguments are made, whatever their annotation allows


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return _output(args) / f"checkpoint-{state.global_step}"


def _planning(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are the planner's, not the controller's own."""
    return {name: value for name, value in options.items() if name not in ("shrink", "fresh", *OPTIONS)}
