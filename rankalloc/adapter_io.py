"""Saving the adapters of a model as plain LoRA: lora_A = Q, lora_B = P·(Λ·s); ``adapter_folder`` has the layouts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from .adapter import Adapter
from .adapter_folder import LayerToWrite, check_layout, lora_config, write_folder
from .adapters import Adapters
from .errors import RankallocError

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForQuestionAnswering": "QUESTION_ANS",
}


def save(adapters: Adapters, path: str | os.PathLike, layout: str = "uniform", *, pad_multiple: int = 1) -> Path:
    """Write the adapters as plain LoRA into the folder ``path``; exactly the function they compute now.

    Task heads that trained along are written as PEFT's modules_to_save.

    Args:
        adapters: may be saved at any moment of a run; dropped triplets that grew back are included.
        path: folder; made if missing, other files in it are left alone.
        layout: "uniform" or "compact"; see :mod:`rankalloc.adapter_folder`.
        pad_multiple: in the uniform layout, round R up to a multiple of this (some servers want 8
            or 16).

    Raises:
        NotAdaptedError: ranks were to be chosen for these adapters and never were.
        RankallocError: the folder cannot be written; what was there is unchanged.
    """
    adapters.check_adapted()
    if not adapters.modules:
        raise RankallocError("these adapters were taken out of their model (detach or merge): nothing is left to save")
    check_layout(layout, pad_multiple)
    held = {name: _factors(adapter) for name, adapter in adapters.modules.items()}
    layers = {
        name: LayerToWrite(a.shape[1], b.shape[0], a.shape[0], torch.promote_types(a.dtype, b.dtype))
        for name, (a, b) in held.items()
    }
    heads = {
        f"{head}.{key}": value
        for head, module in adapters.heads.items() for key, value in module.state_dict().items()
    }
    return write_folder(
        path, layers, held.__getitem__, heads, lambda written, rank: _config(adapters, written, rank), layout,
        pad_multiple,
    )


def _factors(adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A (k, d_in), lora_B (d_out, k)) of the triplets that do something or are kept."""
    lam = adapter.lam.detach()
    keep = adapter.kept | (lam != 0)
    lora_a = adapter.Q.detach()[keep]
    lora_b = adapter.P.detach()[:, keep] * (lam[keep] * adapter.scaling)
    return lora_a.cpu(), lora_b.cpu()


def _config(adapters: Adapters, written: list[str], rank: int) -> dict[str, Any]:
    model = adapters.model
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)
    class_name = type(model).__name__
    return lora_config(
        rank, _target_modules(adapters, written), base_model_name_or_path=base or None,
        task_type=next((t for end, t in _TASK_TYPES.items() if class_name.endswith(end)), None),
        modules_to_save=sorted(adapters.heads) or None, fan_in_fan_out=any(a.kind == "conv1d" for a in adapters),
    )


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
