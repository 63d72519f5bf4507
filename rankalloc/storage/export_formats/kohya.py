"""kohya's format, which image tools read: one file, names without dots, and an alpha beside each pair of factors.

Each layer keeps its own rank, and its alpha is that rank, so that its scale is 1. Where ranks differ the alphas are
left out, which everyone takes for that: diffusers gives some layers of mixed ranks the alpha of others.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import ConfigError, RankallocError, unknown
from .. import key_names
from ..layout import Layout
from ..plain_lora import PlainLora
from ..tensors import write_tensors
from .base import Export


def write(export: Export) -> Path:
    prefix = export.prefix or "lora_unet"
    if prefix not in key_names.KOHYA:
        raise ConfigError(unknown("prefix", prefix, key_names.KOHYA))
    if Path(export.out).suffix != ".safetensors":
        raise ConfigError(f"format 'kohya' writes one file, so out must end in .safetensors; got {str(export.out)!r}")
    tensors, top = _tensors_of(export.lora, prefix, export.layout, str(export.source))
    about = {"ss_network_module": "networks.lora", "ss_network_dim": str(top), "ss_network_alpha": str(top)}
    write_tensors(export.out, tensors, {**export.metadata(), **about})
    return Path(export.out)


def _tensors_of(lora: PlainLora, prefix: str, layout: Layout, what: str) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of a kohya file, and the highest rank in it."""
    if lora.heads:
        raise RankallocError(
            f"{what} holds modules that were trained whole ({next(iter(lora.heads))}), for which kohya's format has no "
            "names; export it with format 'peft'"
        )
    if lora.embeddings:
        raise RankallocError(
            f"{what} adapts the embedding {min(lora.embeddings)}, for which kohya's format has no name; export it with "
            "format 'peft'"
        )
    if lora.groups:
        raise RankallocError(
            f"{what} adapts the grouped convolution {min(lora.groups)}, which kohya's format cannot express; export it "
            "with format 'peft'"
        )
    stems: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in lora.pairs.items():
        if not len(a) and not layout.uniform:
            continue
        stem = key_names.kohya_key(name, prefix)
        if stem in stems:
            raise RankallocError(f"{name} and {stems[stem]} would both be {stem} in kohya's format, which has no dots")
        stems[stem] = name
        rank = layout.stored_rank([len(a)])
        missing = rank - len(a)
        tensors[f"{stem}.lora_down.weight"] = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
        tensors[f"{stem}.lora_up.weight"] = torch.cat([b, b.new_zeros(b.shape[0], missing, *b.shape[2:])], dim=1)
    if not tensors:
        raise RankallocError(f"{what} has no ranks left, so there is nothing to load in kohya's format")
    ranks = {stem: tensors[f"{stem}.lora_down.weight"].shape[0] for stem in stems}
    if len(set(ranks.values())) == 1:
        tensors |= {f"{stem}.alpha": torch.tensor(float(rank)) for stem, rank in ranks.items()}
    return tensors, max(ranks.values())
