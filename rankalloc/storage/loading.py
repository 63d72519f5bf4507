"""Putting a finished adapter into a model: rankalloc's own files, any PEFT LoRA or AdaLoRA; checked before the model
is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.adapter_set import Adapters
from ..adapters.attaching import attach
from ..errors import AdapterFileError, RankallocError, TargetError
from ..layers.adaptable import kind_of, shape_of, why_not
from ..layers.kinds import LAYER_KINDS
from ..lowrank import Factors
from . import fingerprint
from .folder import WEIGHTS_NAME
from .reading import FinishedAdapter, StoredLayer


def load(model: nn.Module, path: str | os.PathLike, *, check_base: bool = True) -> Adapters:
    """Attach the adapter in folder ``path`` to ``model``: rankalloc's own, any PEFT LoRA, or a PEFT AdaLoRA.

    Zero padding is taken off, so ``ranks()`` is what was saved. λ is trainable; it is 1, or what AdaLoRA had.

    Args:
        check_base: refuse a model that is not the base whose fingerprint the file carries
            (:mod:`rankalloc.storage.fingerprint`); another precision of it is no other base.

    Raises:
        AdapterFileError: a file is missing, truncated or pickled, the adapter is of another kind, has weights that
            are not finite, or was made for another model.
        TargetError: the model has adapters attached already.
    """
    finished = FinishedAdapter(path)
    folder, modules = finished.folder, dict(model.named_modules())
    rest = _without_copies(finished, modules)
    heads = _head_names(rest, modules, folder)
    factors = {name: _fitting(finished, layer, modules) for name, layer in finished.layers.items()}
    if check_base:
        fingerprint.check(model, folder / WEIGHTS_NAME)
    states = {
        head: {key[len(head) + 1 :]: finished.head(key) for key in rest if key.startswith(head + ".")}
        for head in heads
    }
    for head, state in states.items():
        _check_head(head, state, modules[head], folder)
    rank = max(1, *(part.rank for part in factors.values()))
    adapters = attach(
        model, rank=rank, alpha=rank, target_modules=lambda name, module: name in factors,
        ranks={name: part.rank for name, part in factors.items()}, modules_to_save=heads,
    )
    with torch.no_grad():
        for name, part in factors.items():
            adapter = adapters.modules[name]
            adapter.Q.copy_(part.Q)
            adapter.P.copy_(part.P)
            adapter.lam.copy_(torch.ones(part.rank) if part.lam is None else part.lam)
            adapter.scaling = part.scaling
        for head, state in states.items():
            modules[head].load_state_dict(state)
    return adapters


def _without_copies(finished: FinishedAdapter, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The heads without the embedding weights that PEFT writes along with an adapted embedding."""
    own = {key: key.replace(".base_layer.", ".") for key in finished.heads if ".base_layer." in key}
    for key, plain in own.items():
        owner, _, attribute = plain.rpartition(".")
        weight, copy = getattr(modules.get(owner), attribute, None), finished.head(key)
        if weight is None or weight.shape != copy.shape or not torch.equal(weight.cpu(), copy.to(weight.dtype)):
            raise AdapterFileError(
                f"{finished.folder} was made for another model: {key} in it is not this model's {plain} (a vocabulary "
                "that was resized, perhaps)"
            )
    return {name: key for name, key in finished.heads.items() if name not in own}


def _head_names(rest: Mapping[str, str], modules: Mapping[str, nn.Module], folder: Path) -> list[str]:
    """The modules that the leftover tensors belong to."""
    heads: list[str] = []
    for key in rest:
        owner = key.rsplit(".", 1)[0]
        if owner not in modules:
            raise AdapterFileError(
                f"{folder} was made for another model: it holds {key}, and this model has no {owner}"
            )
        top = next((h for h in heads if owner == h or owner.startswith(h + ".")), None)
        if top is None:
            heads.append(owner)
    return heads


def _fitting(finished: FinishedAdapter, layer: StoredLayer, modules: Mapping[str, nn.Module]) -> Factors:
    """The factors as matrices for the layer of that name, checked."""
    name, folder = layer.name, finished.folder
    if name not in modules:
        raise AdapterFileError(f"{folder} was made for another model: this one has no layer {name}")
    if isinstance(modules[name], Adapter):
        raise TargetError("this model has adapters attached already; call rankalloc.detach or rankalloc.merge first")
    if why_not(modules[name]):
        raise AdapterFileError(f"{folder}: cannot adapt {name}: {why_not(modules[name])}")
    d_in, d_out = shape_of(modules[name])
    kind = LAYER_KINDS[kind_of(modules[name])]
    if layer.plain and (layer.d_in, layer.d_out) != (d_in, d_out):
        raise AdapterFileError(
            f"{folder} was made for another model: {name} is {layer.d_in} → {layer.d_out} in the adapter and "
            f"{d_in} → {d_out} here"
        )
    try:
        return finished.factors(name, None if layer.plain and kind.plain else partial(kind.unpack, modules[name]))
    except AdapterFileError:
        raise
    except RankallocError as error:
        raise AdapterFileError(f"{folder} does not fit {name}: {error}") from None


def _check_head(head: str, state: Mapping[str, torch.Tensor], module: nn.Module, folder: Path) -> None:
    own = module.state_dict()
    for key in [*own, *state]:
        shapes = [tuple(tensors[key].shape) if key in tensors else "missing" for tensors in (state, own)]
        if shapes[0] != shapes[1]:
            raise AdapterFileError(
                f"{folder} was made for another model, perhaps with other labels: {head}.{key} is {shapes[0]} in the "
                f"adapter and {shapes[1]} here"
            )
