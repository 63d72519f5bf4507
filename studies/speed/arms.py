"""The models that are timed and the ways to train them. All arms take the same batch, loss and AdamW."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForTokenClassification, LlamaConfig, LlamaForCausalLM

import rankalloc as ra

FLOOR, PEFT_LORA, PEFT_ADALORA = "frozen floor", "PEFT LoRA", "PEFT AdaLoRA"
PLAIN, PRUNED, ADAPTER, DEFAULT = "adapter, plain formula", "adapter, all ranks pruned", "adapter", "default method"
BERT_TARGETS = r".*encoder.*(query|key|value|dense)"
BERT_LAYERS = 6
"""How many layers of a block it matches."""
LLAMA_TARGETS = r".*layers.*_proj"
EVERY = 10
"""Steps between two allocations."""


def bert(layers: int = 6, width: int = 384) -> BertForTokenClassification:
    """The shape of MiniLM-L6, or another BERT; without dropout, so that all arms compute the same."""
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 32),
        intermediate_size=4 * width, vocab_size=30522, num_labels=24, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ))


def llama() -> LlamaForCausalLM:
    """Four of SmolLM2-135M's thirty layers, under a small vocabulary."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=576, num_hidden_layers=4, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=4096, max_position_embeddings=512,
    ))


def bert_batch(rows: int = 16, tokens: int = 64) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(1000, 30000, (rows, tokens)), "attention_mask": torch.ones(rows, tokens).long(),
        "labels": torch.randint(0, 24, (rows, tokens)),
    }


def llama_batch(rows: int = 8, tokens: int = 64) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 4096, (rows, tokens))
    return {"input_ids": ids, "labels": ids}


class Arm:
    """One way to train ``model``: its optimizer, and what happens around a step.

    Args:
        kind: one of the names above.
        model: changed in place.
        targets: pattern of the layers to adapt.
        rank: of every adapter.
        total_steps: of the schedule, for arms that allocate.
        budget: of the default method; None allocates every ten steps and keeps all ranks but one.

    Attributes:
        allocations: seconds of each allocation so far.
    """

    def __init__(
        self, kind: str, model: nn.Module, targets: str, rank: int, total_steps: int = 10_000,
        budget: ra.RankBudget | None = None, rate: float = 1e-3,
    ) -> None:
        self.kind, self.model, self.controller, self.adapters, self.count = kind, model, None, None, 0
        self.allocations: list[float] = []
        if kind == FLOOR:
            model.requires_grad_(False)
        elif kind == PEFT_LORA:
            self.model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        elif kind == PEFT_ADALORA:
            self.model = get_peft_model(model, AdaLoraConfig(
                init_r=rank, target_r=max(1, rank // 3), tinit=1, tfinal=1, deltaT=EVERY, total_step=total_steps,
                lora_alpha=2 * rank, target_modules=targets,
                task_type="TOKEN_CLS" if isinstance(model, BertForTokenClassification) else "CAUSAL_LM",
            ))
        else:
            self.adapters = ra.attach(model, rank=rank, target_modules=targets, modules_to_save=())
            if kind == PLAIN:
                for adapter in self.adapters:
                    adapter.base_layer.register_forward_hook(lambda *_: None)  # a layer with a hook is not fused
            elif kind == PRUNED:
                for adapter in self.adapters:
                    adapter.resize(0)
            elif kind == DEFAULT:
                held = ra.RankBudget(ranks=len(self.adapters) * rank - 1, warmup=0.0, every=EVERY, shape="constant")
                self.controller = ra.RankController(self.adapters, budget or held, total_steps)
        trained = [p for p in self.model.parameters() if p.requires_grad and p.numel()]
        if not trained:
            # gradients pass every layer and end there; the embedding table's own gradient would be counted otherwise
            model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, out: out.requires_grad_())
        # one kernel for all parameters; the Trainer's default
        self.optimizer = torch.optim.AdamW(trained, lr=rate, fused=True) if trained else None

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """Take one training step; returns its seconds, without those of an allocation."""
        started = time.perf_counter()
        self.count += 1
        self.model(**batch).loss.backward()
        if self.controller is not None:
            self.controller.observe()
        if self.optimizer is not None:
            self.optimizer.step()
        allocating = 0.0
        if self.controller is not None:
            known, before = len(self.controller.trace.allocations), time.perf_counter()
            self.controller.update(self.optimizer)
            if len(self.controller.trace.allocations) > known:
                allocating = time.perf_counter() - before
                self.allocations.append(allocating)
        if self.kind == PEFT_ADALORA:
            self.model.base_model.update_and_allocate(self.count)
        self.model.zero_grad()
        return time.perf_counter() - started - allocating


def alternate(arms: Sequence[Any], rounds: int, steps: int, step: Callable[[Any], float]) -> list[list[float]]:
    """Mean seconds a step of each arm, per round.

    In each round every arm takes ``steps`` steps in a row, after one that is not counted. Every other round goes
    backwards, so that a change in the machine's speed affects all arms equally.
    """
    times: list[list[float]] = [[] for _ in arms]
    for number in range(rounds + 1):
        order = range(len(arms)) if number % 2 else reversed(range(len(arms)))
        for index in order:
            step(arms[index])
            taken = statistics.fmean(step(arms[index]) for _ in range(steps))
            if number:
                times[index].append(taken)
    return times


def ratio(times: list[float], reference: list[float]) -> dict[str, float]:
    """Median over the rounds of the ratio within a round, and its quartiles."""
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ratio": middle, "low": low, "high": high}
