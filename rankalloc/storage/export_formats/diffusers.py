"""diffusers' own form: one file, the layers' own names behind that of their component, and no alpha, so that each
pair's scale is 1. The configuration that PEFT needs stands in the file's header, as diffusers writes it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from ...errors import ConfigError, RankallocError, unknown
from ..folder import lora_config
from ..key_names import COMPONENTS, METADATA_KEY
from ..tensors import write_tensors
from .base import Export

_READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "use_dora", "lora_dropout")


def write(export: Export) -> Path:
    prefix = export.prefix or "unet"
    if prefix not in COMPONENTS:
        raise ConfigError(unknown("prefix", prefix, COMPONENTS))
    if Path(export.out).suffix != ".safetensors":
        raise ConfigError(
            f"format 'diffusers' writes one file, so out must end in .safetensors; got {str(export.out)!r}"
        )
    lora = export.lora
    for held, what in ((lora.heads, "modules that were trained whole"), (lora.embeddings, "embeddings")):
        if held:
            raise RankallocError(
                f"{export.source} holds {what} ({min(held)}), which diffusers does not read; use format 'peft'"
            )
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, (a, b) in lora.pairs.items():
        rank = export.layout.stored_rank([b.shape[1]]) if b.shape[1] or export.layout.uniform else 0
        if not rank:
            continue
        groups = lora.groups.get(name, 1)
        rows = a.unflatten(0, (groups, b.shape[1]))
        missing = rank - b.shape[1]
        rows = torch.cat([rows, rows.new_zeros(groups, missing, *rows.shape[2:])], 1)
        tensors[f"{prefix}.{name}.lora_A.weight"] = rows.flatten(0, 1)
        tensors[f"{prefix}.{name}.lora_B.weight"] = torch.cat([b, b.new_zeros(len(b), missing, *b.shape[2:])], 1)
        ranks[name] = rank * groups
    if not ranks:
        raise RankallocError(f"{export.source} has no ranks left, so there is nothing for diffusers to load")
    top = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != top}
    config = lora_config(top, sorted(ranks)) | {"rank_pattern": pattern, "alpha_pattern": pattern}
    about = {f"{prefix}.{key}": config[key] for key in _READ}
    write_tensors(export.out, tensors, {**export.metadata(), METADATA_KEY: json.dumps(about, indent=2, sort_keys=True)})
    return Path(export.out)
