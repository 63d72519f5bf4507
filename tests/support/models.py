"""Tiny real models, seeded and on the CPU, and what tests do to them and to their adapters."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rankalloc.adapters import memory

VOCAB, LENGTH, LABELS = 50, 8, 5


def make_bert(labels: int = LABELS, dropout: float = 0.0, hidden: int = 32) -> BertForTokenClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, num_labels=labels, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForTokenClassification(config).eval()


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).eval()


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def make_mlp(d_in: int = 16, hidden: int = 24, d_out: int = 8, depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [d_in, *[hidden] * (depth - 1), d_out]
    layers: list[nn.Module] = []
    for rows, columns in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(rows, columns), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


MAKERS = {"bert": make_bert, "gpt2": make_gpt2, "llama": make_llama}


def token_ids(seed: int = 1, rows: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: nn.Module, inputs: torch.Tensor | None = None) -> torch.Tensor:
    model.eval()
    if inputs is None:
        inputs = token_ids() if hasattr(model, "config") else torch.randn(
            5, 16, generator=torch.Generator().manual_seed(1)
        )
    out = model(inputs)
    return out.logits.clone() if hasattr(out, "logits") else out.clone()


def randomize(adapters, seed: int = 2, heads: bool = True) -> None:
    """Give every adapter (and head) weights that visibly move the output, whatever the initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters:
            for tensor, size in ((adapter.P, 0.3), (adapter.lam, 1.0), (adapter.Q, 0.3)):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * size)
        for head in adapters.heads.values() if heads else ():
            for tensor in head.parameters():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def prune(adapters, ranks) -> None:
    """Keep the first ``ranks[i]`` triplets of adapter i, and take the others out of memory."""
    for adapter, rank in zip(adapters, ranks, strict=True):
        adapter.drop(torch.arange(adapter.rank) < rank)
    memory.shrink(adapters, torch.optim.SGD(adapters.parameters(), lr=0.1))


def token_data(rows: int = 64, seed: int = 5) -> list[dict[str, torch.Tensor]]:
    """Token classification of fixed length: the label is a function of the token and the one before it."""
    ids = token_ids(seed, rows)
    labels = (ids + ids.roll(1, dims=1)) % LABELS
    mask = torch.ones(LENGTH, dtype=torch.long)
    return [{"input_ids": i, "attention_mask": mask, "labels": y} for i, y in zip(ids, labels, strict=True)]


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key
