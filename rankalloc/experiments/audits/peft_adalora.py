"""PEFT's AdaLoRA as its authors mean it: driven by hand at every step, since no trainer does it.

Its budget is a mean rank, which counts every layer alike. Warm-up, freeze and interval are the configuration's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

from ...layers.targets import find_heads
from ..config import RunConfig
from ..runner import steps_of
from ..tasks.base import base_of
from ..trainer import arguments_for, trainer_for
from .arms import Setting


@dataclass(frozen=True)
class Trained:
    """A model with PEFT's AdaLoRA in it after training, and the rank that each layer has left, by the layer's name."""

    model: Any
    ranks: dict[str, int]
    steps: int


def train_adalora(setting: Setting, run: RunConfig, folder: Path, callbacks: list[TrainerCallback]) -> Trained:
    """Train PEFT's AdaLoRA with the rate and the seed of ``run``, at the whole mean rank that the size has room for."""
    import peft

    set_seed(run.seed)
    model: Any = base_of(setting.prepared)
    heads = find_heads(model) if run.adapter.modules_to_save is None else run.adapter.modules_to_save
    steps, names = steps_of(run, setting.prepared.train_examples or 0), [shape.name for shape in setting.shapes]
    wrapped = peft.get_peft_model(model, peft.AdaLoraConfig(
        init_r=run.adapter.rank, target_r=setting.params // setting.one_rank, lora_alpha=run.adapter.alpha,  # type: ignore[arg-type]  # it divides by the rank
       
        lora_dropout=run.adapter.dropout, target_modules=names, modules_to_save=list(heads) or None,
        tinit=int(run.budget.warmup * steps), tfinal=int(run.budget.freeze * steps), deltaT=run.budget.every,
        total_step=steps,
    ))  # fmt: skip
    arguments = arguments_for(run.replaced({"training.save_every": None}), setting.prepared, folder)
    watching = [_Allocates(wrapped), *callbacks]
    with trainer_for(run, wrapped, None, setting.prepared, arguments, watching) as trainer:
        trainer.train()
    return Trained(wrapped, _ranks_of(wrapped, names), steps)


class _Allocates(TrainerCallback):
    """Calls what PEFT leaves to the user, after the optimizer's step and before gradients are gone."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.base_model.update_and_allocate(state.global_step + 1)


def _ranks_of(model: Any, names: list[str]) -> dict[str, int]:
    """The singular values of each layer that are not masked."""
    values = {name: p for name, p in model.named_parameters() if ".lora_E." in name}
    return {
        layer: int(next(p for name, p in values.items() if f".{layer}.lora_E." in f".{name}").ne(0).sum())
        for layer in names
    }
