"""Writing adapters: plain LoRA in PEFT's format, read by every tool that reads LoRA.

lora_A = Q, lora_B = P·(Λ·s), so the file's own scale is 1. Two layouts:

- "uniform": every module padded with zeros to one rank R, r = lora_alpha = R, no patterns. Right
  also in tools that read one global scale and ignore rank_pattern.
- "compact": no padding; rank_pattern = alpha_pattern = the ranks; modules of rank 0 are left out.

How the pair of an embedding or a convolution lies in the file is in :mod:`rankalloc.layer_kinds`. A grouped
convolution has a rank_pattern of its own even in the uniform layout, since PEFT counts its ranks once a group.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import fingerprint
from .adapter import Adapter
from .adapters import Adapters
from .errors import ConfigError, RankallocError, unknown
from .files import replacing, sha256_of
from .tensor_files import encode

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LAYOUTS = ("uniform", "compact")
PREFIX = "base_model.model."
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForQuestionAnswering": "QUESTION_ANS",
}
WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Task types for which PEFT looks for a head in the file, and fails when there is none."""


def save(adapters: Adapters, path: str | os.PathLike, layout: str = "uniform", *, pad_multiple: int = 1) -> Path:
    """Write the adapters as plain LoRA into the folder ``path``; exactly the function they compute now.

    Task heads that trained along are written as PEFT's modules_to_save.

    Args:
        adapters: may be saved at any moment of a run; dropped triplets that grew back are included.
        path: folder; made if missing, other files in it are left alone.
        layout: "uniform" or "compact"; see the module docstring.
        pad_multiple: in the uniform layout, round R up to a multiple of this (some servers want 8
            or 16).

    Raises:
        NotAdaptedError: ranks were to be chosen for these adapters and never were.
        RankallocError: the folder cannot be written; what was there is unchanged.

    Warns of a convolution that PEFT would compute otherwise (dilated, or with a padding mode).
    """
    adapters.check_adapted()
    if not adapters.modules:
        raise RankallocError("these adapters were taken out of their model (detach or merge): nothing is left to save")
    if layout not in LAYOUTS:
        raise ConfigError(unknown("layout", layout, LAYOUTS))
    if not isinstance(pad_multiple, int) or pad_multiple < 1 or (layout == "compact" and pad_multiple != 1):
        raise ConfigError(f"pad_multiple={pad_multiple} is for the uniform layout, and at least 1")
    for note in caveats(adapters):
        warnings.warn(note, stacklevel=2)
    factors = {name: _factors(adapter) for name, adapter in adapters.modules.items()}
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    top = max(1, *ranks.values())
    top = -(-top // pad_multiple) * pad_multiple
    tensors: dict[str, torch.Tensor] = {}
    for name, (lora_a, lora_b) in factors.items():
        if layout == "uniform":
            missing = top - ranks[name]
            lora_a = nn.functional.pad(lora_a, (0, 0, 0, missing))
            lora_b = nn.functional.pad(lora_b, (0, missing))
        elif not ranks[name]:
            continue
        tensors |= _packed(name, adapters.modules[name], lora_a, lora_b)
    for head, module in adapters.heads.items():
        for key, value in module.state_dict().items():
            tensors[f"{PREFIX}{head}.{key}"] = value.detach().cpu().contiguous().clone()
    written = list(adapters.modules) if layout == "uniform" else [n for n, r in ranks.items() if r] or list(ranks)[:1]
    if layout == "compact" and not any(ranks.values()):
        # a LoRA file must adapt something: one module of rank 1 that adds zero
        name = written[0]
        adapter = adapters.modules[name]
        tensors |= _packed(name, adapter, torch.zeros(1, adapter.d_in), torch.zeros(adapter.d_out, 1))
        ranks = {name: 1}
    config = _config(adapters, written, top)
    # a grouped convolution holds each rank once a group, in either layout
    groups = {name: a.layout.groups(a.base_layer) for name, a in adapters.modules.items()}
    stored = {name: (ranks[name] if layout == "compact" else top) * groups[name] for name in written}
    pattern = {f"^{re.escape(name)}": rank for name, rank in stored.items() if rank != top}
    config["rank_pattern"] = pattern
    config["alpha_pattern"] = dict(pattern)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder = Path(path)
    metadata = {"format": "pt", "rankalloc_config": sha256_of(text)}
    base = fingerprint.fingerprint(adapters)
    if base is not None:
        metadata[fingerprint.KEY] = base.encode()
    with replacing(folder / WEIGHTS_NAME) as temporary:
        temporary.write_bytes(encode(tensors, metadata))
        # both files are on disk before either is renamed: a full disk leaves the old pair in place
        with replacing(folder / CONFIG_NAME) as temporary_config:
            temporary_config.write_text(text, encoding="utf-8")
    return folder


def _factors(adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A (k, d_in), lora_B (d_out, k)) of the triplets that do something or are kept."""
    lam = adapter.lam.detach()
    keep = adapter.kept | (lam != 0)
    lora_a = adapter.Q.detach()[keep]
    lora_b = adapter.scaled().detach()[:, keep]
    return lora_a.cpu().clone(), lora_b.cpu().clone()


def _packed(name: str, adapter: Adapter, lora_a: torch.Tensor, lora_b: torch.Tensor) -> dict[str, torch.Tensor]:
    """{key: tensor} of one module, from (k, d_in) and (d_out, k)."""
    pair = adapter.layout.pack(adapter.base_layer, lora_a, lora_b)
    keys = adapter.layout.keys
    return {f"{PREFIX}{name}.{key}": tensor.contiguous() for key, tensor in zip(keys, pair, strict=True)}


def caveats(adapters: Adapters) -> list[str]:
    """Where PEFT would compute otherwise than these adapters do, one sentence each."""
    found = {name: adapter.layout.caveat(adapter.base_layer) for name, adapter in adapters.modules.items()}
    return [f"{name}: {caveat}" for name, caveat in found.items() if caveat]


def _config(adapters: Adapters, written: list[str], rank: int) -> dict[str, Any]:
    model = adapters.model
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)
    class_name = type(model).__name__
    task_type = next((t for end, t in _TASK_TYPES.items() if class_name.endswith(end)), None)
    if not adapters.heads and task_type in WITH_HEAD:
        task_type = None
    return {
        "peft_type": "LORA", "task_type": task_type,
        "base_model_name_or_path": base or None, "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": _target_modules(adapters, written), "rank_pattern": {}, "alpha_pattern": {},
        "modules_to_save": sorted(adapters.heads) or None, "inference_mode": True, "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": any(a.kind == "conv1d" for a in adapters), "init_lora_weights": True,
    }


def _target_modules(adapters: Adapters, written: list[str]) -> list[str] | str:
    """Short suffixes where they name exactly the written modules, else full names, else a pattern."""
    inside = tuple(f"{name}." for name in adapters.modules)
    plain = [name for name, _ in adapters.model.named_modules() if name and not name.startswith(inside)]
    suffixes = {name.rsplit(".", 1)[-1] for name in written}
    for names in (sorted(suffixes), sorted(written)):
        hit = {name for name in plain if any(name == n or name.endswith("." + n) for n in names)}
        if hit == set(written):
            return names
    # a full name that is another's suffix too: PEFT reads a string as a regular expression for whole names
    return "|".join(re.escape(name) for name in sorted(written))
