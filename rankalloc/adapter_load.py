"""Reading plain LoRA back: rankalloc's own files, or any PEFT LoRA; checked before the model is touched."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import fingerprint
from .adapter import Adapter
from .adapter_io import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from .adapters import Adapters
from .attachment import attach
from .base_layers import kind_of, shape_of, why_not
from .errors import AdapterFileError, RankallocError, TargetError
from .files import sha256_of
from .layer_kinds import KINDS
from .tensor_files import read_tensors

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load(model: nn.Module, path: str | os.PathLike, *, check_base: bool = True) -> Adapters:
    """Attach the plain LoRA in folder ``path`` to ``model``: rankalloc's own or any PEFT LoRA.

    Zero padding is taken off, so ``ranks()`` is what was saved. λ is 1 and trainable.

    Args:
        check_base: refuse a model that is not the base whose fingerprint the file carries
            (:mod:`rankalloc.fingerprint`); another precision of it is no other base.

    Raises:
        AdapterFileError: a file is missing, truncated or pickled, the adapter is of another kind
            than LoRA, or it was made for another model.
        TargetError: the model has adapters attached already.
    """
    folder = Path(path)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    pairs, rest = _split(tensors, folder)
    modules = dict(model.named_modules())
    rest = _without_copies(rest, modules, folder)
    heads = _head_names(rest, modules, folder)
    stored = {name: lora_a.shape[0] for name, (lora_a, _) in pairs.items()}
    pairs = {name: _fitting(name, *pair, modules, folder) for name, pair in pairs.items()}
    if check_base:
        fingerprint.check(model, folder / WEIGHTS_NAME)
    states = {
        head: {key[len(head) + 1 :]: value for key, value in rest.items() if key.startswith(head + ".")}
        for head in heads
    }
    for head, state in states.items():
        _check_head(head, state, modules[head], folder)
    scales = {name: _scale(config, name, rank, folder) for name, rank in stored.items()}
    trimmed = {name: _trim(*pair) for name, pair in pairs.items()}
    rank = max(1, *(a.shape[0] for a, _ in trimmed.values()))
    adapters = attach(
        model, rank=rank, alpha=rank, target_modules=lambda name, module: name in pairs,
        ranks={name: a.shape[0] for name, (a, _) in trimmed.items()}, modules_to_save=heads,
    )
    with torch.no_grad():
        for name, (lora_a, lora_b) in trimmed.items():
            adapter = adapters.modules[name]
            adapter.Q.copy_(lora_a)
            adapter.P.copy_(lora_b)
            adapter.lam.fill_(1.0)
            adapter.scaling = scales[name]
        for head, state in states.items():
            modules[head].load_state_dict(state)
    return adapters


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise AdapterFileError(f"no adapter folder at {folder}")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterFileError(f"{folder} holds no {CONFIG_NAME}, so it is no adapter") from None
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise AdapterFileError(f"{folder / CONFIG_NAME} is damaged: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise AdapterFileError(f"{folder} is an adapter of type {kind!r}; this version reads LORA")
    for key in ("use_dora", "trainable_token_indices", "layer_replication", "megatron_config"):
        if config.get(key):
            raise AdapterFileError(f"{folder} uses {key}, which plain low-rank adapters cannot express")
    init = str(config.get("init_lora_weights"))
    if init.startswith(_CHANGES_BASE):
        raise AdapterFileError(
            f"{folder} was made with init_lora_weights={init!r}, which changes the frozen weights too; have PEFT "
            "convert it to plain LoRA (path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        raise AdapterFileError(f"{folder} trained biases (bias={config['bias']!r}), which rankalloc does not carry")
    return config


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise AdapterFileError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read; have it "
                "saved again as safetensors"
            )
        raise AdapterFileError(f"{folder} holds no {WEIGHTS_NAME}")
    tensors, metadata = read_tensors(path)
    expected = metadata.get("rankalloc_config")
    if expected and expected != sha256_of((folder / CONFIG_NAME).read_text(encoding="utf-8")):
        raise AdapterFileError(
            f"{folder}: {CONFIG_NAME} and {WEIGHTS_NAME} are not of one save (an interrupted save, or an edited "
            "config); save the adapter again"
        )
    return tensors


def _split(
    tensors: Mapping[str, torch.Tensor], folder: Path
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, torch.Tensor]]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    rest = {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))", name)
        if match:
            halves.setdefault(match[1], {})[match[2] or match[3]] = value
        elif "lora_" in name:
            raise AdapterFileError(f"{folder}: {key} is a kind of adapter weight this version does not read")
        else:
            rest[name] = value
    for name, pair in halves.items():
        if len(pair) != 2:
            raise AdapterFileError(f"{folder} is incomplete: {name} has lora_{'A' if 'A' in pair else 'B'} alone")
    if not halves:
        raise AdapterFileError(f"{folder} holds no LoRA weights")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}, rest


def _without_copies(
    rest: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module], folder: Path
) -> dict[str, torch.Tensor]:
    """``rest`` without the embedding weights that PEFT writes along with an adapted embedding."""
    own = {key: key.replace(".base_layer.", ".") for key in rest if ".base_layer." in key}
    for key, plain in own.items():
        owner, _, attribute = plain.rpartition(".")
        weight, copy = getattr(modules.get(owner), attribute, None), rest[key]
        if weight is None or weight.shape != copy.shape or not torch.equal(weight.cpu(), copy.to(weight.dtype)):
            raise AdapterFileError(
                f"{folder} was made for another model: {key} in it is not this model's {plain} (a vocabulary that was "
                "resized, perhaps)"
            )
    return {key: value for key, value in rest.items() if key not in own}


def _head_names(rest: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module], folder: Path) -> list[str]:
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


def _fitting(
    name: str, lora_a: torch.Tensor, lora_b: torch.Tensor, modules: Mapping[str, nn.Module], folder: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair as matrices (k, d_in) and (d_out, k) for the layer of that name."""
    if name not in modules:
        raise AdapterFileError(f"{folder} was made for another model: this one has no layer {name}")
    if isinstance(modules[name], Adapter):
        raise TargetError("this model has adapters attached already; call rankalloc.detach or rankalloc.merge first")
    if why_not(modules[name]):
        raise AdapterFileError(f"{folder}: cannot adapt {name}: {why_not(modules[name])}")
    d_in, d_out = shape_of(modules[name])
    try:
        lora_a, lora_b = KINDS[kind_of(modules[name])].unpack(modules[name], lora_a, lora_b)
    except RankallocError as error:
        raise AdapterFileError(f"{folder} does not fit {name}: {error}") from None
    if (lora_a.shape[1], lora_b.shape[0]) != (d_in, d_out):
        raise AdapterFileError(
            f"{folder} was made for another model: {name} is {lora_a.shape[1]} → {lora_b.shape[0]} in the adapter and "
            f"{d_in} → {d_out} here"
        )
    return lora_a, lora_b


def _check_head(head: str, state: Mapping[str, torch.Tensor], module: nn.Module, folder: Path) -> None:
    own = module.state_dict()
    for key in [*own, *state]:
        shapes = [tuple(tensors[key].shape) if key in tensors else "missing" for tensors in (state, own)]
        if shapes[0] != shapes[1]:
            raise AdapterFileError(
                f"{folder} was made for another model, perhaps with other labels: {head}.{key} is {shapes[0]} in the "
                f"adapter and {shapes[1]} here"
            )


def _scale(config: Mapping[str, Any], name: str, rank: int, folder: Path) -> float:
    """PEFT's scale of one module: alpha / r, with patterns as regular expressions, first hit first."""
    try:
        alpha = float(_by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
        named = _by_pattern(config.get("rank_pattern"), name, config.get("r", rank))
    except (re.error, AttributeError, TypeError, ValueError) as error:
        raise AdapterFileError(
            f"{folder / CONFIG_NAME} is damaged: lora_alpha, alpha_pattern or rank_pattern cannot be read ({error})"
        ) from None
    if named != rank:
        raise AdapterFileError(
            f"{folder}: {CONFIG_NAME} and {WEIGHTS_NAME} do not fit: {name} has rank {named} in the one and {rank} "
            "in the other"
        )
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _trim(lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    used = (lora_a != 0).any(1) | (lora_b != 0).any(0)
    return lora_a[used], lora_b[:, used]
