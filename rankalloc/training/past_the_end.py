"""A run that is resumed from the checkpoint of its last step: transformers' Trainer takes one step more, here undone.

The Trainer looks whether it has reached the end only after a step. Nothing tells it to leave that step out, but without
gradients no optimizer changes anything; and with the counters put back, nothing is evaluated, logged or saved anew. The
Trainer asks for that twice, after the step and after the epoch that the step was of.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainerControl, TrainerState


def is_past_the_end(state: TrainerState) -> bool:
    """Whether every step of the run has been trained before it begins."""
    return 0 < state.max_steps <= state.global_step


def empty_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaled: bool) -> None:
    """Let the optimizer's next step change no weight; gradients that are ``scaled`` (fp16) have to be there."""
    if scaled:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    else:
        model.zero_grad(set_to_none=True)


def forget_step(state: TrainerState, control: TrainerControl, epoch: float) -> None:
    """Count the step back that :func:`empty_step` emptied, to ``epoch``, and stop."""
    state.global_step = state.max_steps
    state.epoch = epoch
    control.should_training_stop = True
    control.should_evaluate = control.should_log = control.should_save = False
