"""Loading a finished adapter into a model: rankalloc's own files, any PEFT LoRA or AdaLoRA.

Everything is checked before the model is changed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapter_set import SCALES, Adapters
from ..adapters.attaching import require_free
from ..errors import AdapterFileError
from ..layers.adaptable import why_not
from ..layers.tied import untie
from ..layers.wrapping import unwrapped
from . import fingerprint
from .bottleneck_loading import bottlenecks_in, load_bottlenecks
from .expert_reading import experts_in, read_stacks
from .fitting import at_full_rank, fit, no_ranks
from .folder import WEIGHTS_NAME
from .heads import check_head
from .left_out import left_out_in
from .model_saving import attach
from .reading import FinishedAdapter


def load(model: nn.Module, path: str | os.PathLike, *, check_base: bool = True) -> Adapters:
    """Attach the adapter in folder ``path`` to ``model``: rankalloc's own, any PEFT LoRA, or a PEFT AdaLoRA; or
    bottlenecks that method "bottleneck" trained.

    Zero padding is removed, so ``ranks()`` gives the ranks that were saved, 0 among them; a rank above min(d_in, d_out)
    becomes that rank, with the same ΔW. λ is trainable; it is 1, or AdaLoRA's own. What method "dylora" or
    "matryoshka" trained stays nested: :func:`rankalloc.at_rank` cuts it, and :func:`rankalloc.save` marks it again.

    Args:
        check_base: refuse a model that is not the base whose fingerprint the file carries
            (:mod:`rankalloc.storage.fingerprint`). Another precision of the same base is accepted.

    Raises:
        AdapterFileError: a file is missing, truncated or pickled, the adapter is of a type that is not supported, has
            weights that are not finite, or was made for another model.
        TargetError: the model has adapters attached already.
    """
    model = unwrapped(model)
    require_free(model)
    if (other := bottlenecks_in(path)) is not None:
        return load_bottlenecks(model, other, check_base)
    finished = FinishedAdapter(path, experts=experts_in(model))
    folder, modules = finished.folder, dict(model.named_modules())
    rest = _without_copies(finished, modules)
    heads = _head_names(rest, modules, folder)
    exponent = finished.nested_exponent
    read = {name: fit(finished, name, layer_for(name, modules, folder)) for name in finished.layers}
    read |= read_stacks(finished, model)
    read |= {
        name: no_ranks(finished, name, sides, layer_for(name, modules, folder))
        for name, sides in left_out_in(finished.metadata).items() if name not in read
    }
    factors = {name: at_full_rank(part) for name, part in read.items()}
    if check_base:
        fingerprint.check(model, folder / WEIGHTS_NAME)
    states = {
        head: {key[len(head) + 1 :]: finished.head(key) for key in rest if key.startswith(head + ".")}
        for head in heads
    }
    for head, state in states.items():
        check_head(head, state, modules[head], folder)
    _untie(model, _separate(model, states))
    rank = max(1, *(part.rank for part in factors.values()))
    scale = next((key for key, value in SCALES.items() if value == exponent), "lora")
    adapters = attach(
        model, rank=rank, alpha=rank ** SCALES[scale], target_modules=lambda name, module: name in factors,
        ranks={name: part.rank for name, part in factors.items()}, modules_to_save=heads, scale=scale,
    )
    # the singular triplets of a layer whose rank was lowered are mixtures of those that were trained to be nested
    adapters.nested_exponent = exponent
    adapters.nested = exponent is not None and all(factors[name] is part for name, part in read.items())
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


def _separate(model: nn.Module, states: Mapping[str, Mapping[str, torch.Tensor]]) -> list[str]:
    """The heads that share a weight with another module here and did not where the file was made: the file has several
    values for it, or one that a module which is not in the file must not get."""
    given: dict[int, list[torch.Tensor]] = {}
    for head, state in states.items():
        for key, parameter in model.get_submodule(head).named_parameters(remove_duplicate=False):
            given.setdefault(id(parameter), []).append(state[key])
    for name, module in model.named_modules():
        if not any(f"{name}.".startswith(f"{head}.") for head in states):
            for parameter in module.parameters(recurse=False):
                given.get(id(parameter), []).append(parameter.detach().cpu())
    apart = {key for key, values in given.items() if not all(_same(values[0], other) for other in values[1:])}
    return [head for head in states if any(id(p) in apart for p in model.get_submodule(head).parameters())]


def _same(theirs: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(theirs, other.to(theirs.dtype))


def _untie(model: nn.Module, heads: list[str]) -> None:
    for head in heads:
        untie(model.get_submodule(head))
    config: Any = getattr(model, "config", None)
    if heads and getattr(config, "tie_word_embeddings", False):  # or transformers would tie them again
        config.tie_word_embeddings = False


def _without_copies(finished: FinishedAdapter, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """{name: key} of the heads, without the embedding weights that PEFT copies to the file of an adapted embedding."""
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
    """The modules that these tensors belong to."""
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


def layer_for(name: str, modules: Mapping[str, nn.Module], folder: Path) -> nn.Module:
    """The module of that name, when an adapter can be attached to it."""
    if name not in modules:
        raise AdapterFileError(f"{folder} was made for another model: this one has no layer {name}")
    if why_not(modules[name]):
        raise AdapterFileError(f"{folder}: cannot adapt {name}: {why_not(modules[name])}")
    return modules[name]
