"""Keeping what PEFT writes and reads true to layers whose ranks change: the configuration, and the state dict.

PEFT builds an adapter from its configuration and fills it from the weights. After ranks have changed, the configuration
needs a pattern for each layer:

    rank_pattern, alpha_pattern    {"^" + escaped name: k} and {…: s·k}, so that the scale stays s; r and lora_alpha
                                   stay as they were, for readers that know no patterns
    exclude_modules                layers without a rank: PEFT refuses r = 0

Keys of a pattern are regular expressions, of which the first that matches wins and which PEFT matches to the end of a
name; "^" and the escaping keep l1 from matching l11, or block.l1.

Two hooks on the model do the rest. When a state dict is taken, factors of width 0 are left out, of which PEFT warns and
with which a reader could do nothing; a mark says whose they were. When one is loaded, layers get the ranks of the
weights first: PEFT never rebuilds an adapter that exists, so a checkpoint with fewer ranks would not fit. Hooks take
the layers from the module they are called for, so that they work in copies of a model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..layers.tuners import is_tuner_layer, plain_model
from .ddp import leave_out_empty
from .driven import factors_of, set_width

_KEYS = (("lora_A", "lora_B", ".weight"), ("lora_embedding_A", "lora_embedding_B", ""))


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """{name in the plain model: LoRA layer} of the layers that have this adapter."""
    return {
        name: module for name, module in plain_model(model).named_modules()
        if is_tuner_layer(module) and adapter_name in getattr(module, "scaling", ())
    }


def install_hooks(model: nn.Module, adapter_name: str) -> None:
    """Let state dicts of ``model`` follow the ranks of this adapter from now on."""
    model.register_state_dict_post_hook(partial(_leave_out_empty_factors, adapter_name))
    model.register_load_state_dict_pre_hook(partial(_make_room, adapter_name))


def write_patterns(model: nn.Module, adapter_name: str) -> None:
    """Describe the layers' present ranks in the adapter's configuration."""
    peft: Any = model
    config = peft.peft_config[adapter_name]
    if sum(other is config for other in peft.peft_config.values()) > 1:  # a "ref" adapter that TRL made after adopt
        config = peft.peft_config[adapter_name] = copy.deepcopy(config)
    layers = layers_of(model, adapter_name)
    ranks = {name: factors_of(layer, adapter_name)[0].shape[0] for name, layer in layers.items()}
    config.rank_pattern, config.alpha_pattern = {}, {}
    for name, layer in layers.items():
        alpha = layer.lora_alpha[adapter_name]
        if ranks[name] and (ranks[name], alpha) != (config.r, config.lora_alpha):
            key = "^" + re.escape(name)
            config.rank_pattern[key], config.alpha_pattern[key] = ranks[name], alpha
    if not hasattr(config, "rankalloc_excluded"):
        config.rankalloc_excluded = config.exclude_modules
    config.exclude_modules = _excluding(
        config.rankalloc_excluded, [name for name, rank in ranks.items() if not rank],
        [name for name, rank in ranks.items() if rank],
    )


def _excluding(given: Any, empty: Iterable[str], others: Iterable[str]) -> Any:
    """PEFT's ``exclude_modules``: what the user ``given`` already, and the layers without a rank."""
    empty = list(empty)
    if not empty:
        return given
    hits_another = any(other.endswith("." + name) for name in empty for other in others)
    if isinstance(given, str) or hits_another:  # a string is matched as a whole, a list by its ends
        patterns = [re.escape(name) for name in empty]
        if isinstance(given, str):
            patterns.insert(0, f"(?:{given})")
        else:
            patterns += [rf"(?:.*\.)?{re.escape(name)}" for name in given or ()]
        return "|".join(patterns)
    return sorted({*(given or ()), *empty})


def _leave_out_empty_factors(adapter_name: str, model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    empty: list[int] = []
    for index, (a, b) in enumerate(_keys_of(model, adapter_name, prefix)):
        if a in state and not state[a].numel():
            del state[a], state[b]
            empty.append(index)
    if empty:  # PEFT takes no key without "lora_" in it into a file
        state[_mark(adapter_name, prefix)] = torch.tensor(empty)


def _make_room(adapter_name: str, model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    mark, keys = state.pop(_mark(adapter_name, prefix), None), _keys_of(model, adapter_name, prefix)
    if _is_loaded(adapter_name, model, state):
        for key in (key for pair in keys for key in pair if key not in state):
            # PEFT finds the layers of a file in the model's state dict, where those that have no rank now are left out
            end = ".weight" * key.endswith(".weight")
            in_file = key.removesuffix(f".{adapter_name}{end}") + end
            if in_file in state:
                state[key] = state.pop(in_file)
    if not any(a in state for a, _ in keys):
        return  # other weights than this adapter's
    # the file of an adapter holds every layer with a rank; of a whole model's state the mark says which have none
    empty = None if mark is None else mark.tolist()
    bases = {key.partition(".base_layer.")[0] for key in state if ".base_layer." in key}
    whole = all(_stem(a) in bases for a, _ in keys)
    for index, (layer, (a, b)) in enumerate(zip(layers_of(model, adapter_name).values(), keys, strict=True)):
        own = factors_of(layer, adapter_name)
        if a not in state and (index not in empty if empty is not None else whole):
            continue  # torch reports what is missing
        rank = len(state[a]) if a in state else 0
        if rank != len(own[0]):
            set_width(layer, adapter_name, rank)
        if not rank:
            state[a], state[b] = (parameter.detach() for parameter in own)
            _under_base_layer(state, _stem(a), layer)
    write_patterns(model, adapter_name)
    leave_out_empty(model)


def _is_loaded(adapter_name: str, model: nn.Module, state: dict[str, Any]) -> bool:
    """Whether keys without an adapter's name, which PEFT could not place, are of this adapter: of the one whose other
    keys are there."""
    peft: Any = model
    there = [name for name in peft.peft_config if any(_names(name, key) for key in state)]
    return there == [adapter_name] or not there and len(peft.peft_config) == 1


def _names(adapter_name: str, key: str) -> bool:
    return ".lora_" in key and (f".{adapter_name}." in key or key.endswith(f".{adapter_name}"))


def _stem(key: str) -> str:
    """The name of the LoRA layer in one of its keys."""
    return key.partition(".lora_")[0]


def _mark(adapter_name: str, prefix: str) -> str:
    """The key under which a state dict says which layers, by their place among the adapter's, have no rank."""
    return f"{prefix}rankalloc_without_ranks.{adapter_name}"


def _under_base_layer(state: dict[str, Any], stem: str, layer: Any) -> None:
    """Rename the weights of a layer that a model built from our files has no adapter around."""
    for key in layer.get_base_layer().state_dict():
        if f"{stem}.{key}" in state:
            state[f"{stem}.base_layer.{key}"] = state.pop(f"{stem}.{key}")


def _keys_of(model: nn.Module, adapter_name: str, prefix: str) -> list[tuple[str, str]]:
    """The keys of every layer's A and B in a state dict, in the order of :func:`layers_of`."""
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for layer in layers_of(model, adapter_name).values():
        a, b, end = _KEYS[adapter_name not in layer.lora_A]
        stem = f"{prefix}{names[id(layer)]}"
        found.append((f"{stem}.{a}.{adapter_name}{end}", f"{stem}.{b}.{adapter_name}{end}"))
    return found
