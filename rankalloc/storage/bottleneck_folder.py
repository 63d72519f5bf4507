"""Bottleneck adapters on disk, in a format of their own: no other tool has one that they would fit.

    bottleneck.json           format and version, the base's name, the width and units of every bottleneck, heads
    bottleneck.safetensors    <layer>.down.weight (m, d), .down.bias (m,), .up.weight (d, m), .up.bias (d,);
                              heads.<name> of the modules that were trained whole

:func:`rankalloc.save` writes it for adapters of that kind, and :func:`rankalloc.load` reads it. There is no
adapter_config.json, so no reader of LoRA takes it for one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter_set import Adapters
from ..adapters.bottleneck import BottleneckAdapter
from ..errors import AdapterFileError, ConfigError
from ..files import replacing, sha256_of
from . import fingerprint
from .folder import BOTTLENECK_NAME, CONFIG_NAME, WEIGHTS_NAME, require_destination
from .tensors import Spec, TensorFile, write_stream

BOTTLENECK_WEIGHTS = "bottleneck.safetensors"
ADAPTER_FILES = ((CONFIG_NAME, WEIGHTS_NAME), (BOTTLENECK_NAME, BOTTLENECK_WEIGHTS))
"""The two files of a finished adapter: of a LoRA, or of bottlenecks."""
FORMAT, VERSION, ACTIVATION = "rankalloc-bottleneck", 1, "gelu"
_HASH = "rankalloc_bottleneck"
_PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


@dataclass(frozen=True)
class StoredBottleneck:
    """One bottleneck in a file: W_down (m, d), b_down (m,), W_up (d, m), b_up (d,)."""

    down: torch.Tensor
    b_down: torch.Tensor
    up: torch.Tensor
    b_up: torch.Tensor

    @property
    def units(self) -> int:
        return len(self.down)


def write_bottlenecks(adapters: Adapters, path: str | os.PathLike, heads: Mapping[str, torch.Tensor]) -> Path:
    """Write both files into the folder ``path``; what is there is replaced whole or not at all.

    Args:
        heads: {name in the model: tensor} of the modules that were trained whole.

    Raises:
        ConfigError: the folder holds a LoRA, which every reader would take for the bottlenecks; or a model or a run.
        RankallocError: it cannot be written; its content is unchanged then.
    """
    folder = Path(path)
    require_destination(folder)
    if (folder / CONFIG_NAME).exists():
        raise ConfigError(
            f"{path} holds a LoRA ({CONFIG_NAME}), which every other reader would take for the bottlenecks; give "
            "another folder to write to"
        )
    tensors: dict[str, torch.Tensor] = {}
    places: dict[str, dict[str, int]] = {}
    for name, adapter in adapters.modules.items():
        kept = adapter.kept | adapter.contributes()
        if isinstance(adapter, BottleneckAdapter) and kept.any():
            parts = (adapter.Q[kept], adapter.b_down[kept], adapter.P[:, kept], adapter.b_up)
            tensors |= {f"{name}.{key}": part.detach().cpu() for key, part in zip(_PARTS, parts, strict=True)}
            places[name] = {"d": adapter.d_out, "units": int(kept.sum())}
    tensors |= {f"heads.{name}": value.detach().cpu() for name, value in heads.items()}
    text = json.dumps({
        "format": FORMAT, "version": VERSION, "activation": ACTIVATION, "places": places, "heads": sorted(heads),
        "base_model_name_or_path": fingerprint.name_of(adapters.model),
    }, indent=2, sort_keys=True) + "\n"
    base = fingerprint.fingerprint(adapters)
    about = {"format": "pt", _HASH: sha256_of(text), **({} if base is None else {fingerprint.KEY: base.encode()})}
    with replacing(folder / BOTTLENECK_WEIGHTS) as temporary:
        specs = {key: Spec.of(value) for key, value in tensors.items()}
        write_stream(temporary, specs, about, tensors.__getitem__)
        with replacing(folder / BOTTLENECK_NAME) as description:
            description.write_text(text, encoding="utf-8")
    return folder


def read_bottlenecks(folder: Path) -> tuple[dict[str, StoredBottleneck], dict[str, torch.Tensor]]:
    """({layer: its bottleneck}, {name in the model: tensor of a head}) in ``folder``.

    Raises:
        AdapterFileError: a file is missing or damaged, is of a later version, or holds a number that is not finite.
    """
    try:
        text = (folder / BOTTLENECK_NAME).read_text(encoding="utf-8")
        about = json.loads(text)
    except RecursionError:
        raise AdapterFileError(f"{folder / BOTTLENECK_NAME} is damaged: it is nested too deep") from None
    except (OSError, ValueError) as error:  # of the encoding, of JSON, and of numbers with thousands of digits
        raise AdapterFileError(f"{folder / BOTTLENECK_NAME} is damaged or missing: {str(error)[:200]}") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise AdapterFileError(f"{folder / BOTTLENECK_NAME} does not describe bottleneck adapters of rankalloc's")
    if about.get("version") != VERSION or about.get("activation") != ACTIVATION:
        raise AdapterFileError(
            f"{folder} holds bottlenecks of format version {about.get('version')!r} with {about.get('activation')!r}, "
            f"and this version of rankalloc reads version {VERSION} with {ACTIVATION!r}; update rankalloc"
        )
    if not (folder / BOTTLENECK_WEIGHTS).is_file():
        raise AdapterFileError(f"{folder} holds no {BOTTLENECK_WEIGHTS}")
    file = TensorFile(folder / BOTTLENECK_WEIGHTS)
    if file.metadata.get(_HASH) != sha256_of(text):
        raise AdapterFileError(
            f"{folder}: {BOTTLENECK_NAME} and {BOTTLENECK_WEIGHTS} are not of one save (an interrupted save, or an "
            "edited description); save the adapter again"
        )
    try:
        places: dict[str, Any] = {str(name): (int(p["d"]), int(p["units"])) for name, p in about["places"].items()}
        heads = [str(name) for name in about["heads"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{folder / BOTTLENECK_NAME} is damaged ({error!r})") from None
    stored = {}
    for name, (d, units) in places.items():
        shapes = ((units, d), (units,), (d, units), (d,))
        stored[name] = StoredBottleneck(*(
            _tensor(file, folder, f"{name}.{key}", shape) for key, shape in zip(_PARTS, shapes, strict=True)
        ))
    return stored, {name: _tensor(file, folder, f"heads.{name}") for name in heads}


def _tensor(file: TensorFile, folder: Path, key: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    if key not in file.specs:
        raise AdapterFileError(f"{folder} is incomplete: {BOTTLENECK_WEIGHTS} has no {key}")
    value = file[key]
    if shape is not None and tuple(value.shape) != shape:
        raise AdapterFileError(
            f"{folder}: {key} has the shape {tuple(value.shape)}, and {BOTTLENECK_NAME} says {shape}"
        )
    if value.is_floating_point() and not math.isfinite(float(value.double().abs().sum())):
        raise AdapterFileError(f"{folder}: {key} is not finite (NaN or inf)")
    return value
