"""Writing an adapter folder: plain LoRA in PEFT's format, read by every tool that reads LoRA.

The file's own scale is 1. Two layouts:

- "uniform": every module padded with zeros to one rank R, r = lora_alpha = R, no patterns (but for grouped
  convolutions, whose ranks PEFT counts once a group). Right also in tools that read one global scale and ignore
  rank_pattern.
- "compact": no padding; rank_pattern = alpha_pattern = the ranks; modules of rank 0 are left out.

Factors are asked for layer by layer and go straight to the disk.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, unknown
from ..files import replacing, sha256_of
from .tensors import Spec, write_stream

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LAYOUTS = ("uniform", "compact")
PREFIX = "base_model.model."
NESTED_KEY = "rankalloc_nested"
"""In the weights file's metadata: the first b of a layer's r triplets are an adapter too, at (r / b)^e times the scale
(:mod:`rankalloc.adapters.nested`); the value is e."""

FactorsOf = Callable[[str], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class LayerToWrite:
    """One layer of a folder to write: its shape, its rank, the dtype of its factors; for other layers than linear
    ones the keys of its pair, and how (lora_A, lora_B) become what the file holds."""

    d_in: int
    d_out: int
    rank: int
    dtype: torch.dtype
    keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    pack: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    copies: int = 1
    """How often each rank stands in the file, which counts as so many there: once a group of a convolution."""

    def pair(self, lora_a: torch.Tensor, lora_b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the file holds: padded to ``rank``, and packed."""
        lora_a = nn.functional.pad(lora_a, (0, 0, 0, rank - len(lora_a))) if rank > len(lora_a) else lora_a
        lora_b = nn.functional.pad(lora_b, (0, rank - lora_b.shape[1])) if rank > lora_b.shape[1] else lora_b
        return (lora_a, lora_b) if self.pack is None else self.pack(lora_a, lora_b)

    def nothing(self, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of rank 0."""
        place = {"dtype": self.dtype, "device": device}
        return torch.zeros(0, self.d_in, **place), torch.zeros(self.d_out, 0, **place)


def check_layout(layout: str, pad_multiple: int) -> None:
    """Raise ConfigError when there is no such layout, or it takes no such padding."""
    if layout not in LAYOUTS:
        raise ConfigError(unknown("layout", layout, LAYOUTS))
    if not isinstance(pad_multiple, int) or pad_multiple < 1 or (layout == "compact" and pad_multiple != 1):
        raise ConfigError(
            f"padding to a multiple of {pad_multiple!r} (pad_multiple, --pad-to) is not possible in layout {layout!r}: "
            "it takes a whole number of at least 1, and above 1 the uniform layout"
        )


def lora_config(rank: int, target_modules: list[str] | str, **others: Any) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA of rank and alpha ``rank``; ``others`` replace or add keys."""
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "r": rank, "lora_alpha": rank,
        "lora_dropout": 0.0, "bias": "none", "target_modules": target_modules, "rank_pattern": {}, "alpha_pattern": {},
        "modules_to_save": None, "inference_mode": True, "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False, "init_lora_weights": True, **others,
    }


def check_destination(path: str | os.PathLike, *sources: str | os.PathLike) -> None:
    """Whether an adapter can be written to this folder without hiding something else.

    An adapter that stands there already is replaced. A base model's folder is not one for adapters, since transformers
    loads what adapter it finds there; nor is a run's, whose own adapter would no longer be found.

    Raises:
        ConfigError: the folder is a file, holds a model or a run, or is one of ``sources``.
    """
    folder = Path(path)
    if folder.is_file():
        raise ConfigError(f"{path} is a file; give a folder to write to")
    if any(folder.exists() and Path(source).exists() and folder.samefile(source) for source in sources):
        raise ConfigError(f"{path} is what is read; give another folder to write to")
    if (folder / CONFIG_NAME).exists():
        return
    if (folder / "config.json").exists():
        raise ConfigError(
            f"{path} holds a model (config.json), which would be loaded with the adapter from then on; give another "
            "folder to write to"
        )
    if (folder / "adapter" / CONFIG_NAME).exists():
        raise ConfigError(f"{path} holds a run, whose adapter would be hidden; give another folder to write to")


def write_folder(
    path: str | os.PathLike,
    layers: Mapping[str, LayerToWrite],
    factors: FactorsOf,
    heads: Mapping[str, torch.Tensor | tuple[Spec, Callable[[], torch.Tensor]]],
    config: Callable[[list[str], int], dict[str, Any]],
    layout: str = "uniform",
    pad_multiple: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter; what stood in the folder is replaced whole or not at all.

    Args:
        layers: what to write, by module name.
        factors: module name to (lora_A (k, d_in), lora_B (d_out, k)) of that rank and dtype.
        heads: {parameter name in the model: tensor, or its spec and a way to get it}.
        config: called with the names of the written modules and the rank r, see :func:`lora_config`.
        layout, pad_multiple: see the module docstring; pad_multiple rounds R up.
        metadata: further entries of the weights' file.

    Raises:
        ConfigError: the layout does not exist or takes no padding; or see :func:`check_destination`.
        RankallocError: the folder cannot be written.
    """
    check_layout(layout, pad_multiple)
    check_destination(path)
    top = max([1, *(layer.rank for layer in layers.values())])
    top = -(-top // pad_multiple) * pad_multiple
    written = {name: layer for name, layer in layers.items() if layout == "uniform" or layer.rank}
    if not written:
        # a LoRA file must adapt something: one module of rank 1 that adds zero
        written = dict(list(layers.items())[:1])
    stored = {name: top if layout == "uniform" else max(1, layer.rank) for name, layer in written.items()}
    counted = {name: rank * written[name].copies for name, rank in stored.items()}
    pattern = {f"^{re.escape(name)}": rank for name, rank in counted.items() if rank != top}
    described = {**config(list(written), top), "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    text = json.dumps(described, indent=2, sort_keys=True) + "\n"

    specs: dict[str, Spec] = {}
    sources: dict[str, Callable[[], torch.Tensor]] = {}
    last = _Last(written, stored, factors)
    for name, layer in written.items():
        for part, shaped in enumerate(layer.pair(*layer.nothing("meta"), stored[name])):
            key = f"{PREFIX}{name}.{layer.keys[part]}"
            specs[key], sources[key] = Spec.of(shaped), lambda name=name, part=part: last(name)[part]
    for name, head in heads.items():
        spec, get = (Spec.of(head), lambda head=head: head) if isinstance(head, torch.Tensor) else head
        specs[PREFIX + name], sources[PREFIX + name] = spec, get

    folder = Path(path)
    about = {"format": "pt", **(metadata or {}), "rankalloc_config": sha256_of(text)}
    with replacing(folder / WEIGHTS_NAME) as temporary:
        write_stream(temporary, specs, about, lambda key: sources[key]())
        # both files are on disk before either is renamed: a full disk leaves the old pair in place
        with replacing(folder / CONFIG_NAME) as temporary_config:
            temporary_config.write_text(text, encoding="utf-8")
    return folder


class _Last:
    """The pair of the layer that was asked for last: its two tensors follow one another in a file."""

    def __init__(self, layers: Mapping[str, LayerToWrite], stored: Mapping[str, int], factors: FactorsOf) -> None:
        self._layers, self._stored, self._factors = layers, stored, factors
        self._name: str | None = None
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if name != self._name:
            layer = self._layers[name]
            pair = self._factors(name) if layer.rank else layer.nothing()
            self._name, self._held = name, layer.pair(*pair, self._stored[name])
        return self._held
