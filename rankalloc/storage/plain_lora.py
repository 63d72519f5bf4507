"""A plain LoRA in memory: pairs of factors by module name, read, changed and written without a model.

:func:`rankalloc.save` writes what adapters in a model compute. This module writes the same layouts from factors
that come from elsewhere: another folder, another tool's file, a decomposition.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterFileError
from ..layers.kinds import LAYER_KINDS
from .folder import NESTED_KEY, LayerToWrite, lora_config, write_folder
from .layout import Layout
from .peft_names import KEY, is_parameter, kept_as_parameters, pattern_of
from .reading import FinishedAdapter
from .triplets import triplet_sizes

EMBEDDING = LAYER_KINDS["embedding"]
_KEPT = ("base_model_name_or_path", "task_type", "modules_to_save", "fan_in_fan_out")


@dataclass
class PlainLora:
    """A LoRA whose scale is 1.

    Attributes:
        pairs: {module name: (A, B)}, A (r, d_in) and B (d_out, r), followed by the kernel dimensions in convolutions.
            A grouped convolution's A repeats its r rows for each group, as in PEFT.
        heads: {parameter name: tensor} of the modules that were trained whole.
        groups: {module name: groups} of the grouped convolutions.
        embeddings: names among ``pairs`` that are embeddings.
        config: the entries kept from the adapter_config.json that it was read from; {} for none.
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
        """Numbers in the factors, without the heads."""
        return sum(a.numel() + b.numel() for a, b in self.pairs.values())

    def num_bytes(self) -> int:
        """Bytes of the factors, without the heads."""
        return sum(t.numel() * t.element_size() for pair in self.pairs.values() for t in pair)


def read(path: str | os.PathLike) -> PlainLora:
    """Read the PEFT LoRA in folder ``path``, with its scale in B and without zero padding.

    Raises:
        AdapterFileError: a file is missing, damaged or pickled, a weight is not finite, or the adapter is not a plain
            LoRA.
    """
    finished = FinishedAdapter(path)
    lora = PlainLora(
        {}, {name: finished.head(name) for name in finished.heads},
        config={key: finished.config[key] for key in (*_KEPT, "target_modules", KEY) if key in finished.config},
        metadata={
            k: v for k, v in finished.metadata.items()
            # dropping zero triplets would change the scale that a nested cut uses
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
        lam = finished.raw(name, "E").flatten() if "E" in layer.keys else None
        rows = a.unflatten(0, (groups, b.shape[1])).transpose(0, 1)  # triplet first
        of_a, of_b = triplet_sizes(rows, b, lam, f"{finished.folder}: the weights of {name}")
        used = (of_a != 0) & (of_b != 0)
        scaled = _scaled(b[:, used], layer.scaling if lam is None else lam[used] * layer.scaling)
        lora.pairs[name] = rows[used].transpose(0, 1).flatten(0, 1), scaled
        if layer.ends == EMBEDDING.keys:
            lora.embeddings.add(name)
    return lora


def write(
    lora: PlainLora, path: str | os.PathLike, layout: Layout, target_modules: list[str] | str | None = None
) -> Path:
    """Write ``lora`` into folder ``path`` in PEFT's format.

    Args:
        target_modules: for the configuration; None takes those it was read with if all of them are written, and else
            a pattern of exactly the names that are written.

    Raises:
        ConfigError: the layout does not exist or does not take its padding.
        RankallocError: the folder cannot be written; its old content is unchanged then.
    """
    ranks, layers = lora.ranks(), to_write(lora)

    def factors(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = lora.pairs[name]
        return a.unflatten(0, (lora.groups.get(name, 1), b.shape[1])).transpose(0, 1).flatten(1), b.flatten(1)

    kept = {key: lora.config[key] for key in _KEPT if key in lora.config}

    def config(written: list[str], rank: int) -> dict[str, Any]:
        parameters = kept_as_parameters(lora.config, written)
        targets = target_modules
        if targets is None:
            came_with = lora.config.get("target_modules") if set(written) == set(ranks) else None
            targets = came_with or pattern_of([n for n in written if not is_parameter(n, parameters)], parameters)
        return lora_config(rank, targets, **kept, **({KEY: parameters} if parameters else {}))

    return write_folder(path, layers, factors, lora.heads, config, layout, lora.metadata)


def to_write(lora: PlainLora) -> dict[str, LayerToWrite]:
    """The layers of a folder with this LoRA."""
    layers = {}
    for name, (a, b) in lora.pairs.items():
        groups = lora.groups.get(name, 1)
        layers[name] = LayerToWrite(
            groups * math.prod(a.shape[1:]), len(b), b.shape[1], torch.promote_types(a.dtype, b.dtype),
            EMBEDDING.keys if name in lora.embeddings else LayerToWrite.keys,
            None if a.dim() == 2 else partial(_with_kernel, groups, a.shape[1:], b.shape[2:]), groups,
        )
    return layers


def groups_of(a: torch.Tensor, b: torch.Tensor) -> int:
    """The number of groups of the layer that A and B belong to, above 1 for some convolutions; 0 if they do not fit."""
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


def _scaled(b: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """B (d_out, r, …) times a scale, one number or (r,)."""
    if isinstance(scale, torch.Tensor):
        scale = scale.float().reshape(-1, *[1] * (b.dim() - 2))
    elif scale == 1:
        return b
    return (b.float() * scale).to(b.dtype)
