"""PEFT: loading, its hot swap into a compiled model, and its weighted combinations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from transformers import LlamaConfig, LlamaForCausalLM

import rankalloc as ra
from rankalloc.storage.layout import LAYOUTS

from .samples import SOURCES, sample

IDS = torch.arange(2, 50).view(3, 16)


def tiny() -> LlamaForCausalLM:
    """A tiny Llama of random weights, always the same."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )).eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


def outcomes(folder: Path) -> dict[str, Any]:
    """Each source and layout: {name: the outcome}."""
    found: dict[str, Any] = {"version": f"peft {peft.__version__}"}
    plain = logits_of(tiny())
    for source in SOURCES:
        adapter = sample(source, tiny(), folder / source, size=0.3)
        model = tiny()
        ra.load(model, adapter)
        wanted = logits_of(model)
        effect = float((wanted - plain).abs().max())
        for layout in LAYOUTS:
            ra.export(adapter, folder / source / f"as-{layout}", layout=layout)
            there = peft.PeftModel.from_pretrained(tiny(), folder / source / f"as-{layout}")
            found[f"{source}, {layout}"] = {"difference": _apart(logits_of(there), wanted), "effect": effect}
        if source == "trained":
            for layout in LAYOUTS:
                path = folder / source / f"as-{layout}"
                found[f"hot swap, {layout}"] = _hot_swapped(path, wanted) | {"effect": effect}
                for kind in ("linear", "cat", "svd"):
                    found[f"combination {kind}, {layout}"] = _combined(path, kind, wanted) | {"effect": effect}
    return found


def _hot_swapped(adapter: Path, wanted: torch.Tensor) -> dict[str, Any]:
    """Swapped in the place of an adapter of rank 8 in a model that is ready to be compiled."""
    fresh = peft.get_peft_model(tiny(), peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    prepare_model_for_compiled_hotswap(fresh, target_rank=8)
    try:
        hotswap_adapter(fresh, str(adapter), "default")
    except ValueError as error:
        return {"refused": str(error).split("\n")[0][:80]}
    return {"difference": _apart(logits_of(fresh), wanted)}


def _combined(adapter: Path, kind: str, wanted: torch.Tensor) -> dict[str, Any]:
    """1 and 0 times the same adapter: PEFT's linear combination adds factors up, so that other weights give no sum."""
    model = peft.PeftModel.from_pretrained(tiny(), adapter, adapter_name="one")
    model.load_adapter(adapter, adapter_name="two")
    try:
        model.add_weighted_adapter(["one", "two"], [1.0, 0.0], "both", combination_type=kind)
    except ValueError as error:
        return {"refused": str(error).split("\n")[0][:80]}
    model.set_adapter("both")
    return {"difference": _apart(logits_of(copy.deepcopy(model)), wanted)}


def _apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max())
