"""A plain LoRA as files hold it: pairs of factors by module name. No model is needed to read, change or write one.

:func:`rankalloc.save` writes what adapters in a model compute; here the same two layouts are written from factors that
come from elsewhere: another folder, another tool's file, a decomposition.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterFileError
from ..layers.kinds import LAYER_KINDS
from .folder import NESTED_KEY, LayerToWrite, lora_config, write_folder
from .reading import FinishedAdapter

EMBEDDING = LAYER_KINDS["embedding"]
_KEPT = ("base_model_name_or_path", "task_type", "modules_to_save", "fan_in_fan_out")


@dataclass
class PlainLora:
    """A LoRA whose scale is 1.

    Attributes:
        pairs: {module name: (A, B)}, A (r, d_in) and B (d_out, r); of convolutions with their kernel dimensions behind.
            A grouped convolution's A has its r rows once for each group, as PEFT has them.
        heads: {parameter name: tensor} of the modules that were trained whole.
        groups: {module name: groups} of the grouped convolutions.
        embeddings: names among ``pairs`` that are embeddings.
        config: what is kept of the adapter_config.json it came from; {} for none.
        metadata: of the weights file, such as the base's fingerprint.
    """

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    heads: dict[str, torch.Tensor] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def ranks(self) -> dict[str, int]:
        """{module name: rank}."""
        return {name: b.shape[1] for name, (_, b) in self.pairs.items()}

    def num_params(self) -> int:
        """Numbers in the factors, heads apart."""
        return sum(a.numel() + b.numel() for a, b in self.pairs.values())


def read(path: str | os.PathLike) -> PlainLora:
    """Read the PEFT LoRA in folder ``path``; its scale goes into B, and zero padding comes off.

    Raises:
        AdapterFileError: a file is missing, damaged or pickled, or it is no plain LoRA.
    """
    finished = FinishedAdapter(path)
    lora = PlainLora(
        {}, {name: finished.head(name) for name in finished.heads},
        config={key: finished.config[key] for key in (*_KEPT, "target_modules") if key in finished.config},
        metadata={
            k: v for k, v in finished.metadata.items()
            # trimmed triplets would change the scale that a nested cut goes by
            if k.startswith("rankalloc") and k not in ("rankalloc_config", NESTED_KEY)
        },
    )
    for name, layer in finished.layers.items():
        a, b = finished.raw(name, "A"), finished.raw(name, "B")
        groups = groups_of(a, b)
        if not groups:
            raise AdapterFileError(f"{finished.folder}: the factors of {name} do not fit each other")
        if groups > 1:
            lora.groups[name] = groups
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise AdapterFileError(f"{finished.folder}: the weights of {name} are not finite (NaN or inf)")
        lam = finished.raw(name, "E").flatten() if "E" in layer.keys else None
        lora.pairs[name] = _trimmed(a, b, layer.scaling if lam is None else lam * layer.scaling, groups)
        if layer.ends == EMBEDDING.keys:
            lora.embeddings.add(name)
    return lora


def write(
    lora: PlainLora, path: str | os.PathLike, layout: str = "uniform", *, pad_multiple: int = 1,
    target_modules: list[str] | str | None = None,
) -> Path:
    """Write ``lora`` into folder ``path`` as PEFT reads it; see :func:`rankalloc.save` for the layouts.

    Args:
        target_modules: for the configuration; None for those it came with if all of them are written, and else a
            pattern of exactly the names that are written.

    Raises:
        ConfigError: the layout is unknown or does not take the padding.
        RankallocError: the folder cannot be written; what was there is unchanged.
    """
    ranks = lora.ranks()
    written = [name for name in ranks if layout == "uniform" or ranks[name]] or list(ranks)[:1]
    if target_modules is None:
        came_with = lora.config.get("target_modules") if set(written) == set(ranks) else None
        target_modules = came_with or "|".join(re.escape(name) for name in sorted(written))
    layers, flat = {}, {}
    for name, (a, b) in lora.pairs.items():
        groups = lora.groups.get(name, 1)
        flat[name] = a.unflatten(0, (groups, b.shape[1])).transpose(0, 1).flatten(1), b.flatten(1)
        layers[name] = LayerToWrite(
            flat[name][0].shape[1], len(b), ranks[name], torch.promote_types(a.dtype, b.dtype),
            EMBEDDING.keys if name in lora.embeddings else LayerToWrite.keys,
            None if a.dim() == 2 else partial(_with_kernel, groups, a.shape[1:], b.shape[2:]), groups,
        )
    kept = {key: lora.config[key] for key in _KEPT if key in lora.config}
    return write_folder(
        path, layers, flat.__getitem__, lora.heads, lambda _, rank: lora_config(rank, target_modules, **kept), layout,
        pad_multiple, lora.metadata,
    )


def groups_of(a: torch.Tensor, b: torch.Tensor) -> int:
    """The groups of the layer that these two tensors are for: 1 but for some convolutions; 0 when they are no pair."""
    if min(a.dim(), b.dim()) < 2:
        return 0
    if len(a) == b.shape[1]:
        return 1
    groups, over = divmod(len(a), b.shape[1]) if b.shape[1] else (0, 0)
    whole = not over and a.dim() == b.dim() > 2 and b.shape[2:].numel() == 1
    return groups if whole and groups and not (a.shape[1] % groups or len(b) % groups) else 0


def _with_kernel(
    groups: int, of_a: Sequence[int], of_b: Sequence[int], a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return a.reshape(len(a), groups, *of_a).transpose(0, 1).flatten(0, 1), b.reshape(*b.shape, *of_b)


def _trimmed(
    a: torch.Tensor, b: torch.Tensor, scale: float | torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair without the triplets that are zero, and with the scale, one number or (r,), in B."""
    rows = a.unflatten(0, (groups, b.shape[1]))
    used = (rows != 0).transpose(0, 1).flatten(1).any(1) & (b != 0).transpose(0, 1).flatten(1).any(1)
    scaled = b[:, used]
    if isinstance(scale, torch.Tensor):
        scale = scale[used].float().reshape(-1, *[1] * (b.dim() - 2))
    whole = isinstance(scale, float) and scale == 1
    return rows[:, used].flatten(0, 1), scaled if whole else (scaled.float() * scale).to(b.dtype)
