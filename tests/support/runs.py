"""A run small enough for a test: a two-layer BERT with the real tokenizer, on a file of the test's own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from rankalloc.experiments.config import RunConfig, load_config
from rankalloc.experiments.tasks.packages import minilm_folder
from rankalloc.trace import RankTrace

WORDS = [
    "the", "film", "was", "good", "bad", "long", "short", "loved", "hated", "plot", "actor", "scene", "music", "ending",
    "never", "again",
]


def tiny_model(folder: Path) -> Path:
    """A real model folder: tiny BERT weights beside MiniLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128,
    )).save_pretrained(folder)
    return folder


def sentences(path: Path, rows: int = 60) -> Path:
    """JSONL with text and label; the label is whether "good" or "loved" comes up."""
    generator = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for _ in range(rows):
            words = [WORDS[i] for i in torch.randint(0, len(WORDS), (6,), generator=generator)]
            file.write(json.dumps({"text": " ".join(words), "label": int("good" in words or "loved" in words)}) + "\n")
    return path


def small_yaml(folder: Path) -> Path:
    """A configuration file that trains the tiny model in about a second."""
    tiny_model(folder / "model")
    sentences(folder / "data.jsonl")
    path = folder / "small.yaml"
    path.write_text(
        "name: small\n"
        "task: {kind: text-classification, train: data.jsonl}\n"
        "model: ./model\n"
        "adapter: {rank: 4, alpha: 8}\n"
        "budget: {fraction: 0.5, every: 1}\n"
        "training: {steps: 6, batch_size: 4, learning_rate: 5e-3, log_every: 2}\n"
        "sweep: {trials: 4, finalists: 1, search: {rank: [2, 4], budget: {low: 0.4, high: 0.9}}}\n"
    )
    return path


def small_config(folder: Path, *overrides: str) -> RunConfig:
    """The same, loaded."""
    return load_config(small_yaml(folder), overrides)


def meets_budget(trace: RankTrace) -> bool:
    """Whether a run spent its budget: no further rank of any layer that may have one more would fit."""
    sizes = [1 if trace.budget.unit == "ranks" else layer.d_in + layer.d_out for layer in trace.layers]
    sizes = [size * 4 for size in sizes] if trace.budget.unit == "bytes" else sizes
    spent = sum(size * rank for size, rank in zip(sizes, trace.final_ranks, strict=True))
    growable = [
        size for size, rank, layer in zip(sizes, trace.final_ranks, trace.layers, strict=True)
        if rank < layer.initial_rank
    ]
    return 0 <= trace.budget.target - spent < min(growable, default=trace.budget.target + 1)
