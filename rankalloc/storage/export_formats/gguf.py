"""llama.cpp's own format, written by the ``gguf`` library: one file, exact for mixed ranks.

llama.cpp scales each pair by the file's one alpha over the pair's own rank. Alpha is therefore the highest rank R here,
and B is multiplied by its rank over R, which the reader undoes. Names are llama.cpp's for the base's architecture, and
rows of B are in the order in which its converter puts those of the weight: for models of Llama's kind, the two halves
of each head's rotary pairs of q and k are interleaved.

Cost: the whole adapter in memory. Weakness: only architectures in :data:`ARCHITECTURES`, whose weights its converter
renames, and reorders in no other way. For others the converter itself reads a folder in the layout "one-alpha".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...errors import AdapterFileError, ConfigError, RankallocError, unknown
from ...files import replacing
from ..plain_lora import PlainLora
from .base import Export


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers, as llama.cpp knows it: its ``name`` there, and whether its converter interleaves
    the rows of q and k (``interleaves``)."""

    name: str
    interleaves: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", True), "mistral": Architecture("llama", True),
    "smollm3": Architecture("smollm3", True), "granite": Architecture("granite", True),
    "qwen2": Architecture("qwen2"), "qwen3": Architecture("qwen3"), "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"), "gemma3_text": Architecture("gemma3"), "phi3": Architecture("phi3"),
    "starcoder2": Architecture("starcoder2"), "stablelm": Architecture("stablelm"), "cohere": Architecture("command-r"),
}
"""{model_type in config.json: what it is in llama.cpp}."""


def write(export: Export) -> Path:
    out = Path(export.out)
    if out.suffix != ".gguf":
        raise ConfigError(f"format 'gguf' writes one file, so out must end in .gguf; got {str(export.out)!r}")
    if find_spec("gguf") is None:
        raise ConfigError('format \'gguf\' is written by the gguf library: pip install "rankalloc[gguf]"')
    config = _base_config(export)
    tensors, top = tensors_of(export.lora, config, str(export.source))
    import gguf

    with replacing(out) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURES[config["model_type"]].name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(top))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def tensors_of(lora: PlainLora, config: dict[str, Any], what: str) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of the file, in float32 or float16, and the highest rank, which is its alpha.

    Args:
        config: of the base model, as its config.json.
        what: the adapter's name in messages.

    Raises:
        RankallocError: llama.cpp cannot hold this adapter, or does not know a layer of it.
        AdapterFileError: the adapter is of another model.
    """
    for held, name in (
        (lora.heads, "modules that were trained whole"), (lora.embeddings, "embeddings"),
        (lora.groups, "grouped convolutions"), (lora.config.get("target_parameters"), "experts"),
    ):
        if held:
            raise RankallocError(f"{what} holds {name} ({min(held)}), which a llama.cpp adapter cannot")
    import gguf

    architecture = ARCHITECTURES[config["model_type"]]
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, int(config["num_hidden_layers"]))
    ranks = {name: rank for name, rank in lora.ranks().items() if rank}
    top = max(ranks.values(), default=1)
    tensors: dict[str, torch.Tensor] = {}
    for name, rank in ranks.items():
        stored = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        if stored is None:
            raise RankallocError(f"llama.cpp has no layer {name} in models of the type {config['model_type']!r}")
        a, b = lora.pairs[name]
        b = b.float() * (rank / top)
        role = name.rpartition(".")[2]
        if architecture.interleaves and role in ("q_proj", "k_proj"):
            heads = config["num_attention_heads"]
            heads = heads if role == "q_proj" else config.get("num_key_value_heads") or heads
            if len(b) % (2 * heads):
                raise AdapterFileError(f"{what} is of another model: {name} has {len(b)} outputs for {heads} heads")
            b = _interleaved(b, heads)
        # float16 where the file held half as many bits: llama.cpp adds adapters in float32 or float16
        dtype = torch.float16 if a.dtype == torch.float16 else torch.float32
        tensors[f"{stored}.lora_a"], tensors[f"{stored}.lora_b"] = a.to(dtype), b.to(dtype)
    if not tensors:
        raise RankallocError(f"{what} has no ranks left, so there is nothing for llama.cpp to load")
    return tensors, top


def _interleaved(b: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k, (heads · 2 · half, r), with the two halves of each head's rotary pairs side by side."""
    return b.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _base_config(export: Export) -> dict[str, Any]:
    """The configuration of the base model's text part."""
    named = export.lora.config.get("base_model_name_or_path")
    given = export.base if export.base is not None else named
    if not given:
        raise ConfigError("the adapter does not name its base model, whose names llama.cpp needs: give base= (--base)")
    from transformers import AutoConfig

    path = Path(given)
    try:
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
        else:
            config = AutoConfig.from_pretrained(given).to_dict()
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"the configuration of the base model {str(given)!r} cannot be read, whose names llama.cpp needs: give its "
            f"folder as base= (--base) ({why})"
        ) from None
    if config.get("model_type") not in ARCHITECTURES:
        raise ConfigError(
            unknown("model type for format 'gguf':", str(config.get("model_type")), ARCHITECTURES)
            + "; export it --for llama.cpp as a folder (layout 'one-alpha') and let llama.cpp's converter read that"
        )
    return dict(config)
