"""Turning a file of another tool (kohya, diffusers, bare PEFT) into an adapter folder."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import AdapterFileError, ConfigError, unknown
from ..layers.adaptable import shape_of, why_not
from . import fingerprint, key_names, plain_lora
from .layout import Layout
from .plain_lora import PlainLora
from .tensors import read_tensors


def import_lora(
    path: str | os.PathLike, model: nn.Module, out: str | os.PathLike, *, component: str | None = None
) -> PlainLora:
    """Turn a kohya, diffusers or bare PEFT file into an adapter folder that :func:`rankalloc.load` and PEFT read.

    Args:
        path: the ``.safetensors`` file.
        model: the model it is for; only the names and shapes of its layers are read, so it may be on the meta device.
            kohya's names cannot be understood without them.
        out: folder to write.
        component: which part of the file: "unet", "transformer", "text_encoder", "text_encoder_2"; None when it has
            only one.

    Returns:
        The adapter that was written.

    Raises:
        AdapterFileError: the file is damaged, is not a plain LoRA, was made for another model, or a name in it could
            mean several layers. Nothing is written then.
        ConfigError: the file has no such component.
    """
    what = str(path)
    if not Path(path).is_file():
        raise AdapterFileError(f"no file at {what}; give the .safetensors file itself")
    tensors, metadata = read_tensors(path)
    if not tensors:
        raise AdapterFileError(f"{what} holds no tensors")
    groups = key_names.group(tensors, what)
    component = _choose(groups, component, what)
    chosen = groups[component]
    layers = {name: module for name, module in model.named_modules() if name and not why_not(module)}
    key_names.take_scales(chosen, component, metadata, what)
    names = key_names.resolve(chosen.entries, chosen.flat, layers, what)
    lora = PlainLora({}, config={"fan_in_fan_out": any(type(layers[n]).__name__ == "Conv1D" for n in names.values())})
    for name, entry in chosen.entries.items():
        layer = layers[names[name]]
        lora.pairs[names[name]] = _pair(names[name], entry, layer, what)
        if getattr(layer, "groups", 1) > 1:
            lora.groups[names[name]] = layer.groups
    lora.metadata = {key: value for key, value in metadata.items() if key.startswith("rankalloc")}
    if fingerprint.KEY not in lora.metadata:
        base = fingerprint.fingerprint(model)
        lora.metadata |= {fingerprint.KEY: base.encode()} if base is not None else {}
    plain_lora.write(lora, out, Layout("compact"))
    return lora


def _choose(groups: Mapping[str, Any], component: str | None, what: str) -> str:
    if component is None and len(groups) == 1:
        return next(iter(groups))
    named = sorted(name or "(no component)" for name in groups)
    if component is None:
        raise ConfigError(f"{what} holds {', '.join(named)}; say with component= which of them this model is")
    if component not in groups:
        raise ConfigError(f"{what}: {unknown('component', component, named)}")
    return component


def _pair(
    name: str, entry: key_names.Entry, layer: nn.Module, what: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of one module, with the scale in B, without the 1 × 1 kernels of a linear layer and with those of a
    convolution, which some tools leave out."""
    down, up = entry.pair
    kernel = tuple(getattr(layer, "kernel_size", ()))
    if not kernel or type(layer).__name__ == "Conv1D":
        down, up = (t.flatten(1) if t.dim() > 2 and t.shape[2:].numel() == 1 else t for t in (down, up))
    else:
        ones = (1,) * len(kernel)
        down = down.view(*down.shape, *ones) if down.dim() == 2 and math.prod(kernel) == 1 else down
        up = up.view(*up.shape, *ones) if up.dim() == 2 else up
    found, groups = plain_lora.groups_of(down, up), getattr(layer, "groups", 1)
    if found == 1 < groups:
        raise AdapterFileError(
            f"{what} takes no account of the {groups} groups of the convolution {name}, as kohya's format cannot; only "
            "a LoRA in PEFT's form can be imported for it"
        )
    if found != groups:
        raise AdapterFileError(f"{what}: the factors of {name} do not fit each other")
    d_in, d_out = shape_of(layer)
    d_in *= groups  # a grouped convolution's weight sees one group, and its LoRA's first factor all of them
    if (down.shape[1:].numel(), up.shape[0]) != (d_in, d_out):
        raise AdapterFileError(
            f"{what} was made for another model: {name} is {down.shape[1:].numel()} → {up.shape[0]} in the adapter and "
            f"{d_in} → {d_out} here"
        )
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise AdapterFileError(f"{what}: the factors of {name} hold NaN or inf: the training diverged")
    rank = down.shape[0]
    scale = 1.0 if entry.alpha is None or not rank else entry.alpha / rank
    return down, up if scale == 1 else (up.float() * scale).to(up.dtype)
