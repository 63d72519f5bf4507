"""The decoders that :mod:`studies.speed.gpu` times on a device, and the ways to train them.

All arms take the same batch, loss and fused AdamW, and train under bfloat16 autocast with float32 adapters, as
transformers' Trainer does with ``bf16=True``. Weights are random: speed does not depend on them, and nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import rankalloc as ra

from .arms import LLAMA_TARGETS

FLOOR, PEFT_LORA, PEFT_ADALORA = "frozen base", "PEFT LoRA", "PEFT AdaLoRA"
ATTACH, ATTACH_LORA, ADOPT = "ra.attach", 'ra.attach(init="lora")', "ra.adopt"
ARMS = (FLOOR, PEFT_LORA, PEFT_ADALORA, ATTACH, ATTACH_LORA, ADOPT)
PRECISIONS = ("bf16", "4bit")
EVERY, TOTAL = 100_000, 1_000_000
"""Steps between two allocations of the schedule, so that none falls among those that are timed, and of the whole."""


class Shape(NamedTuple):
    """A Llama: width, width of the feed-forward part, heads, key and value heads, layers of the real model."""

    width: int
    inner: int
    heads: int
    kv_heads: int
    layers: int


SHAPES = {
    "llama-1b": Shape(2048, 8192, 32, 8, 16), "llama-3b": Shape(3072, 8192, 24, 8, 28),
    "llama-8b": Shape(4096, 14336, 32, 8, 32),
}
"""Llama 3.1 and 3.2."""
TINY = {"tiny": Shape(64, 128, 4, 2, 2)}
"""For trying the script out."""


def decoder(shape: Shape, layers: int, vocabulary: int, precision: str, device: torch.device) -> PreTrainedModel:
    """``layers`` layers of ``shape`` in bfloat16 under a small vocabulary; with "4bit" their linears are NF4."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, use_cache=False,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if precision == "4bit":
        pack(model, device)
    # in every arm gradients pass all layers, as they do under gradient checkpointing
    model.requires_grad_(False).enable_input_require_grads()
    return model.train()


def pack(model: PreTrainedModel, device: torch.device) -> None:
    """Put double-quantised NF4 layers in the place of the decoder's linear ones. Raises ImportError without
    bitsandbytes."""
    import bitsandbytes as bnb

    for parent in list(model.model.layers.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                packed = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16,
                    quant_type="nf4", device="meta",
                )
                packed.weight = bnb.nn.Params4bit(
                    linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                parent._modules[name] = packed.to(device)  # packs the weight
    model.is_loaded_in_4bit = True  # what PEFT goes by


class Arm:
    """One way to train ``model``, in phases that are measured apart.

    Args:
        kind: one of :data:`ARMS`.
        model: from :func:`decoder`; changed in place.
        batch: what every step takes.
        rank: of every adapter.

    Attributes:
        allocates: whether :meth:`allocate` does anything.
    """

    def __init__(self, kind: str, model: PreTrainedModel, batch: dict[str, torch.Tensor], rank: int) -> None:
        self.kind, self.model, self.batch, self.device = kind, model, batch, batch["input_ids"].device
        self.controller: Any = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.count = self.allocations = 0
        common: dict[str, Any] = {"lora_alpha": 2 * rank, "target_modules": LLAMA_TARGETS, "task_type": "CAUSAL_LM"}
        adapters = None
        if kind in (PEFT_LORA, ADOPT):
            self.model = get_peft_model(model, LoraConfig(r=rank, **common))
        elif kind == PEFT_ADALORA:
            self.model = get_peft_model(model, AdaLoraConfig(
                init_r=rank, target_r=max(1, rank // 4), tinit=1, tfinal=1, deltaT=EVERY, total_step=TOTAL, **common
            ))
        if kind == ADOPT:
            adapters = ra.adopt(self.model)
        elif kind in (ATTACH, ATTACH_LORA):
            init = "svd" if kind == ATTACH else "lora"
            adapters = ra.attach(model, rank=rank, target_modules=LLAMA_TARGETS, modules_to_save=(), init=init)
        if adapters is not None:
            budget = ra.RankBudget(ranks=sum(adapters.ranks().values()) // 4, warmup=0.0, every=EVERY)
            self.controller = ra.RankController(adapters, budget, total_steps=TOTAL)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if trained:
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.allocates = self.controller is not None or kind == PEFT_ADALORA

    def phases(self) -> list[tuple[str, Callable[[], Any]]]:
        """The parts of a step in order; together they are one."""
        found: list[tuple[str, Callable[[], Any]]] = [("model", self._pass)]
        if self.controller is not None:
            found.append(("observe", self.controller.observe))
        if self.optimizer is not None:
            found.append(("optimizer", self.optimizer.step))
        if self.controller is not None:
            found.append(("update", lambda: self.controller.update(self.optimizer)))
        elif self.kind == PEFT_ADALORA:
            found.append(("update", self._update_adalora))
        return [*found, ("zero", self.model.zero_grad)]

    def step(self) -> None:
        """Take one training step."""
        for _, phase in self.phases():
            phase()

    def before_allocation(self) -> None:
        """The part of a step that an allocation follows; the gradients stay for PEFT's."""
        for name, phase in self.phases():
            if name not in ("update", "zero"):
                phase()

    def allocate(self) -> None:
        """The schedule's next allocation; beside AdaLoRA's masks it scores that step too."""
        self.allocations += 1
        step = EVERY * self.allocations
        if self.controller is not None:
            from rankalloc.training.allocation import allocate

            allocate(self.controller.state, step, self.optimizer)
        else:
            self.model.base_model.update_and_allocate(step)

    def _pass(self) -> None:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.model(**self.batch).loss
        loss.backward()

    def _update_adalora(self) -> None:
        self.count += 1
        self.model.base_model.update_and_allocate(self.count)
