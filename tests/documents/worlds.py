"""What the Python blocks of docs/ take for granted: models, data and folders, all real and tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import rankalloc as ra
from tests.support.models import make_bert, make_llama, make_mlp, randomize, token_data, token_ids
from tests.support.report_odd_samples import one_layer

Names = dict[str, Any]


def own_model(folder: Path) -> Names:
    return {"model": make_bert(), "train_data": token_data()}


def sharded(folder: Path) -> Names:
    """A decoder, in a group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return {"model": make_llama()}


def averaged(folder: Path) -> Names:
    if distributed.is_initialized():
        distributed.destroy_process_group()
    model = make_mlp()
    adapters = ra.attach(model, rank=4)
    return {
        "model": model, "adapters": adapters, "optimizer": torch.optim.AdamW(adapters.parameters(), lr=1e-2),
        "loss": lambda model: model(torch.randn(4, 16)).square().mean(),
    }


def own_score(folder: Path) -> Names:
    model = make_mlp()
    return {"model": model, "adapters": ra.attach(model, rank=4), "plain_model": make_mlp()}


def library(folder: Path) -> Names:
    """Two adapters on a shelf, one of them in two versions."""
    for name in ("german", "legal/v1", "legal/v2"):
        model = make_llama()
        adapters = ra.attach(model, rank=2, modules_to_save=())
        randomize(adapters)
        ra.save(adapters, folder / "adapters" / name)
    return {"model": make_llama(), "batch": {"input_ids": token_ids(0)[:3]}}


def quantised(folder: Path) -> Names:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=16,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(0)]
    return {"name": str(folder / "base"), "data": rows * 4}


def language(folder: Path) -> Names:
    """A language model in a folder and the data that pages name, as files."""
    from tests.support.language import conversations, counting, preferences, save_language_model

    pairs = [{"anchor": counting(i), "positive": counting(i + 5)} for i in range(40)]
    for name, rows in (("chat", conversations()), ("preferences", preferences()), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": str(save_language_model(folder / "base"))}


def experts(folder: Path) -> Names:
    from tests.support.architectures import ARCHITECTURES

    architecture = ARCHITECTURES["mixtral"]
    return {
        "model": architecture.build().train(), "batch": architecture.inputs(0), "load_base": architecture.build,
        "torch": torch,
    }


def two_runs(folder: Path) -> Names:
    for name in ("a", "b"):
        one_layer().model_copy(update={"name": name}).save(folder / "runs" / name / "trace.json")
    return {}


WORLDS: dict[str, dict[int, Callable[[Path], Names]]] = {
    "docs/own-model.md": {0: own_model},
    "docs/processes.md": {0: sharded, 1: averaged},
    "docs/extending.md": {0: own_score},
    "docs/serving.md": {0: library},
    "docs/quantised.md": {0: quantised},
    "docs/trl.md": {0: language},
    "docs/data.md": {0: language},
    "docs/qlora.md": {0: language},
    "docs/experts.md": {0: experts},
    "docs/sentence-transformers.md": {0: language},
    "docs/reports.md": {0: two_runs},
}
"""{page: {index of a Python block: what it adds to the names that blocks before it left}}."""

SHORTER = {
    "docs/own-model.md": {"max_steps=20,": "max_steps=4, disable_tqdm=True,"},
    "docs/trl.md": {
        "max_steps=500,": "max_steps=6, use_cpu=True, disable_tqdm=True,", "save_steps=100,": "save_steps=2,",
    },
    "docs/qlora.md": {"max_steps=500,": "max_steps=3, use_cpu=True, disable_tqdm=True,"},
    "docs/sentence-transformers.md": {"max_steps=500,": "max_steps=6, use_cpu=True, disable_tqdm=True,"},
    "docs/quantised.md": {"max_steps=1000,": "max_steps=4, disable_tqdm=True,"},
}
"""{page: {text in its code: what a test runs in its place}}."""
