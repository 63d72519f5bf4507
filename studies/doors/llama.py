"""A tiny Llama that counts in strides, and the strides it is adapted to.

A sequence is x, x + s, x + 2s, ... modulo the vocabulary. The model is trained on strides 1 to 3 and then adapted
to 5 and 7. With these there are 128 sequences in all: a run draws from them, and its loss is the exact mean over all.
It measures how well few ranks learn, not whether what they learn carries over. The first step of a sequence cannot be
foreseen: no loss is below log(2) / (LENGTH - 1).
"""

from __future__ import annotations

import copy
import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH, BATCH = 64, 24, 32
BEFORE, AFTER = (1, 2, 3), (5, 7)
PRETRAINING_STEPS, PRETRAINING_RATE = 600, 3e-3


def sequences(strides: tuple[int, ...]) -> torch.Tensor:
    """Every first token with every stride: tokens of shape (len(strides) * VOCABULARY, LENGTH)."""
    first = torch.arange(VOCABULARY).repeat(len(strides))
    steps = torch.tensor(strides).repeat_interleave(VOCABULARY)
    return (first[:, None] + steps[:, None] * torch.arange(LENGTH)) % VOCABULARY


def batch_of(tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A batch drawn with replacement."""
    return tokens[torch.randint(len(tokens), (BATCH,), generator=generator)]


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss of a next token, in nats."""
    return model(input_ids=tokens, labels=tokens).loss


@functools.cache
def _pretrained() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, use_cache=False,
    ))  # fmt: skip
    tokens, generator = sequences(BEFORE), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_RATE, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, PRETRAINING_STEPS)
    for _ in range(PRETRAINING_STEPS):
        loss_of(model, batch_of(tokens, generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return model.eval()


def pretrained() -> LlamaForCausalLM:
    """A fresh copy of the model, trained once in each process."""
    return copy.deepcopy(_pretrained())
