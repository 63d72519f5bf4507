"""A plain LoRA as files hold it: pairs of factors by module name. No model is needed to read, change or write one.

:func:`rankalloc.save` writes what adapters in a model compute; here the same two layouts are written from factors that
come from elsewhere: another folder, another tool's file, a decomposition.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .adapter_io import CONFIG_NAME, LAYOUTS, PREFIX, WEIGHTS_NAME
from .adapter_load import _read_config, _read_tensors, _scale
from .errors import AdapterFileError, ConfigError, unknown
from .files import replacing, sha256_of
from .tensor_files import encode, read_tensors

_PAIR = re.compile(r"(.+)\.(lora_(?:embedding_)?)([AB])(?:\.weight)?")
_KEPT = ("base_model_name_or_path", "task_type", "modules_to_save", "fan_in_fan_out")


@dataclass
class PlainLora:
    """A LoRA whose scale is 1.

    Attributes:
        pairs: {module name: (A, B)}, A (r, d_in) and B (d_out, r); of convolutions with their kernel dimensions behind.
        heads: {parameter name: tensor} of the modules that were trained whole.
        embeddings: names among ``pairs`` that are embeddings.
        config: what is kept of the adapter_config.json it came from; {} for none.
        metadata: of the weights file, such as the base's fingerprint.
    """

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    heads: dict[str, torch.Tensor] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def ranks(self) -> dict[str, int]:
        """{module name: rank}."""
        return {name: len(a) for name, (a, _) in self.pairs.items()}

    def num_params(self) -> int:
        """Numbers in the factors, heads apart."""
        return sum(a.numel() + b.numel() for a, b in self.pairs.values())


def read(path: str | os.PathLike) -> PlainLora:
    """Read the PEFT LoRA in folder ``path``; its scale goes into B, and zero padding comes off.

    Raises:
        AdapterFileError: a file is missing, damaged or pickled, or it is no plain LoRA.
    """
    folder = Path(path)
    config = _read_config(folder)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    lora = PlainLora({}, config={key: config[key] for key in (*_KEPT, "target_modules") if key in config})
    for key, tensor in _read_tensors(folder).items():
        name = key.removeprefix(PREFIX)
        match = _PAIR.fullmatch(name)
        if match is None and "lora_" in name:
            raise AdapterFileError(f"{folder}: {key} is a kind of adapter weight this version does not read")
        if match is None:
            lora.heads[name] = tensor
            continue
        halves.setdefault(match[1], {})[match[3]] = tensor
        if match[2] == "lora_embedding_":
            lora.embeddings.add(match[1])
    if not halves:
        raise AdapterFileError(f"{folder} holds no LoRA weights")
    for name, half in halves.items():
        lora.pairs[name] = _fitting(name, half, folder)
    scales = {name: _scale(config, name, len(a), folder) for name, (a, _) in lora.pairs.items()}
    lora.pairs = {name: _trimmed(a, b, scales[name]) for name, (a, b) in lora.pairs.items()}
    lora.metadata = _metadata(folder / WEIGHTS_NAME)
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
    check_layout(layout, pad_multiple)
    ranks = lora.ranks()
    top = max(1, *ranks.values()) if ranks else 1
    top = -(-top // pad_multiple) * pad_multiple
    written = [name for name in ranks if layout == "uniform" or ranks[name]] or list(ranks)[:1]
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in lora.heads.items()}
    stored = {}
    for name in written:
        a, b = lora.pairs[name]
        stored[name] = top if layout == "uniform" else max(1, ranks[name])
        missing = stored[name] - len(a)
        a = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing, *b.shape[2:])], dim=1)
        ends = ("lora_A.weight", "lora_B.weight")
        if name in lora.embeddings:
            ends = ("lora_embedding_A", "lora_embedding_B")
        tensors |= {f"{PREFIX}{name}.{end}": t.contiguous() for end, t in zip(ends, (a, b), strict=True)}
    if target_modules is None:
        came_with = lora.config.get("target_modules") if set(written) == set(ranks) else None
        target_modules = came_with or "|".join(re.escape(name) for name in sorted(written))
    pattern = {f"^{re.escape(name)}": rank for name, rank in stored.items() if rank != top}
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "r": top, "lora_alpha": top,
        "lora_dropout": 0.0, "bias": "none", "target_modules": target_modules, "rank_pattern": pattern,
        "alpha_pattern": dict(pattern), "modules_to_save": None, "inference_mode": True, "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True,
        **{key: lora.config[key] for key in _KEPT if key in lora.config},
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    metadata = {**lora.metadata, "format": "pt", "rankalloc_config": sha256_of(text)}
    folder = Path(path)
    with replacing(folder / WEIGHTS_NAME) as temporary:
        temporary.write_bytes(encode(tensors, metadata))
        # both files are on disk before either is renamed: a full disk leaves the old pair in place
        with replacing(folder / CONFIG_NAME) as temporary_config:
            temporary_config.write_text(text, encoding="utf-8")
    return folder


def check_layout(layout: str, pad_multiple: int) -> None:
    """Raise ConfigError when there is no such layout, or it does not take that padding."""
    if layout not in LAYOUTS:
        raise ConfigError(unknown("layout", layout, LAYOUTS))
    if not isinstance(pad_multiple, int) or pad_multiple < 1 or (layout == "compact" and pad_multiple != 1):
        raise ConfigError(f"padding to a multiple of {pad_multiple!r} is for the uniform layout, and at least 1")


def _fitting(
    name: str, half: Mapping[str, torch.Tensor], folder: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    if len(half) != 2:
        raise AdapterFileError(f"{folder} is incomplete: {name} has lora_{next(iter(half))} alone")
    a, b = half["A"], half["B"]
    if a.dim() < 2 or b.dim() < 2 or len(a) != b.shape[1]:
        raise AdapterFileError(f"{folder}: the factors of {name} do not fit each other")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterFileError(f"{folder}: the factors of {name} hold NaN or inf; its training has diverged")
    return a, b


def _trimmed(a: torch.Tensor, b: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair without the triplets that are zero, and with the scale in B."""
    used = (a != 0).flatten(1).any(1) & (b != 0).transpose(0, 1).flatten(1).any(1)
    scaled = b[:, used]
    return a[used], scaled if scale == 1 else (scaled.float() * scale).to(b.dtype)


def _metadata(path: Path) -> dict[str, str]:
    _, metadata = read_tensors(path)
    return {key: value for key, value in metadata.items() if key.startswith("rankalloc") and key != "rankalloc_config"}
