"""Writing an adapter folder: plain LoRA in PEFT's format, which every tool that reads LoRA can read.

The scale is in lora_B, so the file's own scale, lora_alpha / r, is 1. :mod:`rankalloc.storage.layout` describes the two
layouts. The writer asks for factors layer by layer and sends them straight to the disk.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..files import replacing, sha256_of
from ..layers.kinds import LAYER_KINDS
from .experts import keyed_as
from .layout import Layout
from .left_out import LEFT_OUT_KEY, left_out_entry, left_out_in
from .peft_names import KEY, is_parameter
from .readers import find_reader, require_taken
from .tensors import Spec, write_stream

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
BOTTLENECK_NAME = "bottleneck.json"
"""The description of bottleneck adapters, which are no LoRA (:mod:`.bottleneck_folder`)."""
MIXTURE_NAME = "mixture.json"
"""The description of a mixture of adapters, which is no adapter (:mod:`.mixture_folder`)."""
OTHER_KINDS = {
    BOTTLENECK_NAME: "holds bottleneck adapters, which are no LoRA: rankalloc.load puts them into their model, and "
    "nothing else reads them",
    MIXTURE_NAME: "is a mixture of several adapters, whose weights depend on the input, and not one adapter; load it "
    "with rankalloc.load_mixture",
}
"""{file: what a folder that has it is, in the words of a message}: kinds of adapters that are not plain LoRA."""
PREFIX = "base_model.model."
"""What PEFT puts before every module's name in the weights file."""
NESTED_KEY = "rankalloc_nested"
"""Marks a nested adapter in the weights file's metadata; its value is e. The first b of a layer's r triplets are then
an adapter too, at (r / b)^e times the scale (:mod:`rankalloc.adapters.nested`): e is 1 or ½ after method "dylora", as
its scale was, and 0 after "matryoshka"."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""(lora_A, lora_B) of one layer."""
FactorsOf = Callable[[str], Pair]
Heads = Mapping[str, torch.Tensor | tuple[Spec, Callable[[], torch.Tensor]]]
"""{parameter name in the model: its tensor, or its spec and a function that returns it}."""


@dataclass(frozen=True)
class LayerToWrite:
    """One layer of a folder to write.

    Attributes:
        d_in, d_out, rank, dtype: of its factors.
        keys: what the keys of its pair end with.
        pack: turns (lora_A, lora_B) into the tensors of the file; None for a linear layer, whose are the same.
        copies: how often each rank is in the file, which counts it as often: once per group of a convolution.
        owner: of a stacked parameter (:mod:`.experts`): the name of the module that holds it; else "".
    """

    d_in: int
    d_out: int
    rank: int
    dtype: torch.dtype
    keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    pack: Callable[[torch.Tensor, torch.Tensor], Pair] | None = None
    copies: int = 1
    owner: str = ""

    @property
    def plain(self) -> bool:
        """Whether it is a linear layer."""
        return self.pack is None and self.keys == LayerToWrite.keys

    def pair(self, lora_a: torch.Tensor, lora_b: torch.Tensor, rank: int) -> Pair:
        """The tensors of the file: the factors padded to ``rank`` and packed."""
        lora_a = nn.functional.pad(lora_a, (0, 0, 0, rank - len(lora_a))) if rank > len(lora_a) else lora_a
        lora_b = nn.functional.pad(lora_b, (0, rank - lora_b.shape[1])) if rank > lora_b.shape[1] else lora_b
        return (lora_a, lora_b) if self.pack is None else self.pack(lora_a, lora_b)

    def numbers(self, rank: int) -> int:
        """How many numbers its pair has in the file at ``rank``."""
        return sum(tensor.numel() for tensor in self.pair(*self.nothing("meta"), rank))

    def nothing(self, device: str = "cpu") -> Pair:
        """Factors of rank 0."""
        return (
            torch.zeros(0, self.d_in, dtype=self.dtype, device=device),
            torch.zeros(self.d_out, 0, dtype=self.dtype, device=device),
        )


def lora_config(rank: int, target_modules: list[str] | str, **others: Any) -> dict[str, Any]:
    """The adapter_config.json of a plain LoRA whose r and lora_alpha are ``rank``; ``others`` replace or add keys."""
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "r": rank, "lora_alpha": rank,
        "lora_dropout": 0.0, "bias": "none", "target_modules": target_modules, "rank_pattern": {}, "alpha_pattern": {},
        "modules_to_save": None, "inference_mode": True, "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": False, "init_lora_weights": True, **others,
    }


def require_destination(path: str | os.PathLike, *sources: str | os.PathLike) -> None:
    """Make sure that an adapter can be written to this folder without hiding something else.

    An adapter that is already there may be replaced. A base model's folder is refused, since transformers would load
    any adapter it finds there; so is a run's, whose own adapter would no longer be found.

    Raises:
        ConfigError: ``path`` is a file, holds a model or a run, or is one of ``sources``.
    """
    folder = Path(path)
    if folder.is_file():
        raise ConfigError(f"{path} is a file; give a folder to write to")
    if any(folder.exists() and Path(source).exists() and folder.samefile(source) for source in sources):
        raise ConfigError(f"{path} is the adapter that is read; give another folder to write to")
    if (folder / CONFIG_NAME).exists():
        return
    if (folder / "config.json").exists():
        raise ConfigError(
            f"{path} holds a model (config.json), and transformers would load the adapter along with it; give another "
            "folder to write to"
        )
    if (folder / "adapter" / CONFIG_NAME).exists():
        raise ConfigError(f"{path} holds a run, whose adapter would be hidden; give another folder to write to")


def write_folder(
    path: str | os.PathLike,
    layers: Mapping[str, LayerToWrite],
    factors: FactorsOf,
    heads: Heads,
    config: Callable[[list[str], int], dict[str, Any]],
    layout: Layout,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter; an adapter that is already there is replaced whole or not at all.

    Args:
        layers: what to write, by module name.
        factors: returns (lora_A (k, d_in), lora_B (d_out, k)) of a module, of its rank and dtype.
        heads: the modules that were trained whole.
        config: returns the configuration for the names of the written modules and the rank r; see :func:`lora_config`.
        metadata: further entries of the weights file. Layers without ranks that it names (:mod:`.left_out`) are
            written along where the layout holds such layers.

    Raises:
        ConfigError: the layout does not exist or does not take its padding; the reader that it is for cannot take the
            adapter; or see :func:`require_destination`.
        RankallocError: the folder cannot be written.
    """
    layout.check()
    require_destination(path)
    layers = _with_left_out(layers, metadata or {})
    require_taken_by(layout, layers, heads)
    top, stored = _stored_ranks(layers, layout)
    written = {name: layers[name] for name in stored}
    counted = {name: rank * written[name].copies for name, rank in stored.items()}
    described = config(list(written), top)
    by_weight = {name for name in counted if is_parameter(name, described.get(KEY) or ())}
    pattern = {
        # PEFT matches a pattern with the name of the parameter where it was told of one
        f"^{re.escape(name)}" + r"(\.weight)?" * (name in by_weight): rank
        for name, rank in counted.items() if rank != top
    }
    one_alpha = layout.name == "one-alpha"
    described |= {"rank_pattern": pattern, "alpha_pattern": {} if one_alpha else dict(pattern)}
    text = json.dumps(described, indent=2, sort_keys=True) + "\n"

    specs: dict[str, Spec] = {}
    sources: dict[str, Callable[[], torch.Tensor]] = {}
    # the reader's scale, lora_alpha / rank, is 1 but in the layout with one alpha
    shares = {name: rank / top if one_alpha else 1.0 for name, rank in counted.items()}
    pairs = _PairCache(written, stored, factors, shares)
    places = keyed_as({name: layer.owner for name, layer in written.items()})
    for name, layer in written.items():
        for part, shaped in enumerate(layer.pair(*layer.nothing("meta"), stored[name])):
            key = f"{PREFIX}{places[name]}.{layer.keys[part]}"
            specs[key], sources[key] = Spec.of(shaped), partial(pairs.part, name, part)
    for name, head in heads.items():
        if isinstance(head, torch.Tensor):
            specs[PREFIX + name], sources[PREFIX + name] = Spec.of(head), partial(_itself, head)
        else:
            specs[PREFIX + name], sources[PREFIX + name] = head

    folder = Path(path)
    kept = {key: value for key, value in (metadata or {}).items() if key != LEFT_OUT_KEY}
    without = {name: (layer.d_in, layer.d_out) for name, layer in layers.items() if name not in written and layer.plain}
    about = {"format": "pt", **kept, **left_out_entry(without), "rankalloc_config": sha256_of(text)}
    with replacing(folder / WEIGHTS_NAME) as temporary:
        write_stream(temporary, specs, about, lambda key: sources[key]())
        # both files are on disk before either is renamed: a full disk leaves the old pair in place
        with replacing(folder / CONFIG_NAME) as temporary_config:
            temporary_config.write_text(text, encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Stored:
    """What a folder's LoRA tensors hold, without the modules that were trained whole.

    Attributes:
        layout: of the folder.
        reader: for which reader the layout was chosen; empty where the user chose it.
        rank: r in its configuration.
        numbers: in all tensors.
        padding: those of them that only pad ranks.
        bytes: of all tensors.
        padding_bytes: those of them that only pad ranks.
    """

    layout: str
    reader: str
    rank: int
    numbers: int
    padding: int
    bytes: int
    padding_bytes: int


def stored_size(
    layers: Mapping[str, LayerToWrite], layout: Layout, metadata: Mapping[str, str] | None = None
) -> Stored:
    """What :func:`write_folder` would store of these layers; nothing is computed."""
    layers = _with_left_out(layers, metadata or {})
    top, ranks = _stored_ranks(layers, layout)
    numbers = {name: layers[name].numbers(rank) for name, rank in ranks.items()}
    padding = {name: amount - layers[name].numbers(layers[name].rank) for name, amount in numbers.items()}
    size, padded = (sum(n * layers[name].dtype.itemsize for name, n in each.items()) for each in (numbers, padding))
    return Stored(layout.name, layout.reader, top, sum(numbers.values()), sum(padding.values()), size, padded)


def require_taken_by(layout: Layout, layers: Mapping[str, LayerToWrite], heads: Iterable[str]) -> None:
    """Raise ConfigError when the reader that the layout is for, if any, cannot take these layers and heads."""
    if not layout.reader:
        return
    holds = {
        "heads": min(heads, default=None),
        "embeddings": next((n for n, layer in layers.items() if layer.keys == LAYER_KINDS["embedding"].keys), None),
        "experts": next((name for name, layer in layers.items() if layer.owner), None),
        "groups": next((name for name, layer in layers.items() if layer.copies > 1), None),
    }
    written = [name for name, layer in layers.items() if layout.uniform or layer.rank]
    require_taken(find_reader(layout.reader), {what: name for what, name in holds.items() if name}, written)


def _with_left_out(layers: Mapping[str, LayerToWrite], metadata: Mapping[str, str]) -> dict[str, LayerToWrite]:
    """``layers``, and at rank 0 those that the file they come from has left out."""
    dtype = next((layer.dtype for layer in layers.values()), torch.float32)
    left_out = left_out_in(metadata)
    others = {name: LayerToWrite(*sides, 0, dtype) for name, sides in left_out.items() if name not in layers}
    return {**layers, **others}


def _stored_ranks(layers: Mapping[str, LayerToWrite], layout: Layout) -> tuple[int, dict[str, int]]:
    """r of the folder, and the rank that each layer in it is stored with."""
    top = layout.stored_rank(layer.rank for layer in layers.values())
    written = {name: layer for name, layer in layers.items() if layout.uniform or layer.rank}
    if not written:
        # a LoRA file must adapt something: one module of rank 1 that adds zero
        written = dict(list(layers.items())[:1])
    return top, {name: layout.rank_in_file(layer.rank, top) for name, layer in written.items()}


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _PairCache:
    """Keeps the pair of the layer that was asked for last: its two tensors follow one another in a file."""

    def __init__(
        self, layers: Mapping[str, LayerToWrite], stored: Mapping[str, int], factors: FactorsOf,
        shares: Mapping[str, float],
    ) -> None:
        self._layers, self._stored, self._factors, self._shares = layers, stored, factors, shares
        self._last: tuple[str, Pair] | None = None

    def part(self, name: str, part: int) -> torch.Tensor:
        """lora_A (part 0) or lora_B (part 1) of a layer, as the file holds it."""
        if self._last is None or self._last[0] != name:
            layer = self._layers[name]
            lora_a, lora_b = self._factors(name) if layer.rank else layer.nothing()
            if (share := self._shares[name]) != 1:
                lora_b = (lora_b.float() * share).to(lora_b.dtype)
            self._last = name, layer.pair(lora_a, lora_b, self._stored[name])
        return self._last[1][part]
