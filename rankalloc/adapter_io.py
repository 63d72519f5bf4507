"""Adapters on disk: plain LoRA in PEFT's format, read by every tool that reads LoRA.

lora_A = Q, lora_B = P·(Λ·s), so the file's own scale is 1. Two layouts:

- "uniform": every module padded with zeros to one rank R, r = lora_alpha = R, no patterns. Right
  also in tools that read one global scale and ignore rank_pattern.
- "compact": no padding; rank_pattern = alpha_pattern = the ranks; modules of rank 0 are left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .adapters import Adapters
from .attachment import attach
from .errors import AdapterFileError, ConfigError, RankallocError, TargetError, unknown
from .files import replacing, sha256_of
from .tensor_files import encode, read_tensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LAYOUTS = ("uniform", "compact")
_PREFIX = "base_model.model."
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForQuestionAnswering": "QUESTION_ANS",
}


def save(adapters: Adapters, path: str | os.PathLike, layout: str = "uniform", *, pad_multiple: int = 1) -> Path:
    """Write the adapters as plain LoRA into the folder ``path``; exactly the function they compute now.

    Task heads that trained along are written as PEFT's modules_to_save.

    Args:
        adapters: may be saved at any moment of a run; dropped triplets that grew back are included.
        path: folder; made if missing, other files in it are left alone.
        layout: "uniform" or "compact"; see the module docstring.
        pad_multiple: in the uniform layout, round R up to a multiple of this (some servers want 8
            or 16).

    Raises:
        NotAdaptedError: ranks were to be chosen for these adapters and never were.
        RankallocError: the folder cannot be written; what was there is unchanged.
    """
    adapters.check_adapted()
    if not adapters.modules:
        raise RankallocError("these adapters were taken out of their model (detach or merge): nothing is left to save")
    if layout not in LAYOUTS:
        raise ConfigError(unknown("layout", layout, LAYOUTS))
    if not isinstance(pad_multiple, int) or pad_multiple < 1 or (layout == "compact" and pad_multiple != 1):
        raise ConfigError(f"pad_multiple={pad_multiple} is for the uniform layout, and at least 1")
    factors = {name: _factors(adapter) for name, adapter in adapters.modules.items()}
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    top = max(1, *ranks.values())
    top = -(-top // pad_multiple) * pad_multiple
    tensors: dict[str, torch.Tensor] = {}
    for name, (lora_a, lora_b) in factors.items():
        if layout == "uniform":
            missing = top - ranks[name]
            lora_a = nn.functional.pad(lora_a, (0, 0, 0, missing))
            lora_b = nn.functional.pad(lora_b, (0, missing))
        elif not ranks[name]:
            continue
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = lora_a.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = lora_b.contiguous()
    for head, module in adapters.heads.items():
        for key, value in module.state_dict().items():
            tensors[f"{_PREFIX}{head}.{key}"] = value.detach().cpu().contiguous().clone()
    written = list(adapters.modules) if layout == "uniform" else [n for n, r in ranks.items() if r] or list(ranks)[:1]
    if layout == "compact" and not any(ranks.values()):
        # a LoRA file must adapt something: one module of rank 1 that adds zero
        name = written[0]
        adapter = adapters.modules[name]
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = torch.zeros(1, adapter.d_in)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = torch.zeros(adapter.d_out, 1)
        ranks = {name: 1}
    config = _config(adapters, written, top)
    if layout == "compact":
        pattern = {f"^{re.escape(name)}": ranks[name] for name in written if ranks[name] != top}
        config["rank_pattern"] = pattern
        config["alpha_pattern"] = dict(pattern)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder = Path(path)
    with replacing(folder / WEIGHTS_NAME) as temporary:
        temporary.write_bytes(encode(tensors, {"format": "pt", "rankalloc_config": sha256_of(text)}))
        # both files are on disk before either is renamed: a full disk leaves the old pair in place
        with replacing(folder / CONFIG_NAME) as temporary_config:
            temporary_config.write_text(text, encoding="utf-8")
    return folder


def load(model: nn.Module, path: str | os.PathLike) -> Adapters:
    """Attach the plain LoRA in folder ``path`` to ``model``: rankalloc's own or any PEFT LoRA.

    Zero padding is taken off, so ``ranks()`` is what was saved. λ is 1 and trainable.

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
    heads = _head_names(rest, modules, folder)
    for name, (lora_a, lora_b) in pairs.items():
        _check_fit(name, lora_a, lora_b, modules, folder)
    states = {
        head: {key[len(head) + 1 :]: value for key, value in rest.items() if key.startswith(head + ".")}
        for head in heads
    }
    for head, state in states.items():
        _check_head(head, state, modules[head], folder)
    scales = {name: _scale(config, name, lora_a.shape[0], folder) for name, (lora_a, _) in pairs.items()}
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


def _factors(adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A (k, d_in), lora_B (d_out, k)) of the triplets that do something or are kept."""
    lam = adapter.lam.detach()
    keep = adapter.kept | (lam != 0)
    lora_a = adapter.Q.detach()[keep]
    lora_b = adapter.P.detach()[:, keep] * (lam[keep] * adapter.scaling)
    return lora_a.cpu().clone(), lora_b.cpu().clone()


def _config(adapters: Adapters, written: list[str], rank: int) -> dict[str, Any]:
    model = adapters.model
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)
    class_name = type(model).__name__
    return {
        "peft_type": "LORA", "task_type": next((t for end, t in _TASK_TYPES.items() if class_name.endswith(end)), None),
        "base_model_name_or_path": base or None, "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": _target_modules(adapters, written), "rank_pattern": {}, "alpha_pattern": {},
        "modules_to_save": sorted(adapters.heads) or None, "inference_mode": True, "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": any(a.kind == "conv1d" for a in adapters), "init_lora_weights": True,
    }


def _target_modules(adapters: Adapters, written: list[str]) -> list[str] | str:
    """Short suffixes where they name exactly the written modules, else full names, else a pattern."""
    inside = tuple(f"{name}." for name in adapters.modules)
    plain = [name for name, _ in adapters.model.named_modules() if name and not name.startswith(inside)]
    suffixes = {name.rsplit(".", 1)[-1] for name in written}
    for names in (sorted(suffixes), sorted(written)):
        hit = {name for name in plain if any(name == n or name.endswith("." + n) for n in names)}
        if hit == set(written):
            return names
    # a full name that is another's suffix too: PEFT reads a string as a regular expression for whole names
    return "|".join(re.escape(name) for name in sorted(written))


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
        name = key.removeprefix(_PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match:
            halves.setdefault(match[1], {})[match[2]] = value
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


def _check_fit(
    name: str, lora_a: torch.Tensor, lora_b: torch.Tensor, modules: Mapping[str, nn.Module], folder: Path
) -> None:
    from .base_layers import shape_of, why_not

    if name not in modules:
        raise AdapterFileError(f"{folder} was made for another model: this one has no layer {name}")
    if isinstance(modules[name], Adapter):
        raise TargetError("this model has adapters attached already; call rankalloc.detach or rankalloc.merge first")
    if why_not(modules[name]):
        raise AdapterFileError(f"{folder}: cannot adapt {name}: {why_not(modules[name])}")
    d_in, d_out = shape_of(modules[name])
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise AdapterFileError(f"{folder}: the factors of {name} do not fit each other")
    if (lora_a.shape[1], lora_b.shape[0]) != (d_in, d_out):
        raise AdapterFileError(
            f"{folder} was made for another model: {name} is {lora_a.shape[1]} → {lora_b.shape[0]} in the adapter and "
            f"{d_in} → {d_out} here"
        )


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
