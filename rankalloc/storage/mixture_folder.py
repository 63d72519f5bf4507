"""A mixture on disk: several adapters cut together, and the gates that weigh them.

    mixture.json           what it is: format and version, the adapters, the gate's kind, every layer's ranks
    mixture.safetensors    <layer>.P (d_out, R), .lam (R,), .Q (R, d_in), the triplets of all adapters side by side;
                           <layer>.gate.weight and .bias, or model.gate.* where all layers share one;
                           <head>.head.<name> of a task head, or <head>.heads.weight (K, …) where they are mixed too

No reader of plain LoRA takes it for one: there is no adapter_config.json, and no tensor is called lora_A or lora_B. The
weights file carries a hash of the description, so that two files that are not of one save are refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterFileError, ConfigError
from ..files import replacing, sha256_of
from ..lowrank import Factors
from . import fingerprint
from .folder import CONFIG_NAME, MIXTURE_NAME, require_destination
from .tensors import Spec, TensorFile, write_stream

MIXTURE_WEIGHTS = "mixture.safetensors"
FORMAT, VERSION = "rankalloc-mixture", 1
OF_MODEL = "model"
"""The name of the one gate that all layers share."""
GATES = ("layer", OF_MODEL)
_HASH = "rankalloc_mixture"

Pair = tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class MixtureParts:
    """What a mixture is made of, without a model.

    Attributes:
        adapters: the names of its K adapters.
        gate: "layer" for one gate a layer, "model" for one in all.
        activation: of the gates.
        layers: {layer: the update of each adapter}.
        gates: {layer, or "model": W (K, d) and b (K,)}; {} before there are any.
        heads: {module: {name: tensor}} of task heads that all inputs share.
        mixed_heads: {linear layer of a task head: (K, d_out, d_in) and (K, d_out) or None}.
        base: the base model's name or folder.
        fingerprint: of the base, as text.
    """

    adapters: list[str]
    gate: str
    activation: str
    layers: dict[str, list[Factors]]
    gates: dict[str, Pair] = field(default_factory=dict)
    heads: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    mixed_heads: dict[str, Pair] = field(default_factory=dict)
    base: str | None = None
    fingerprint: str | None = None

    def gated(self) -> list[str]:
        """The names of the gates there must be."""
        return [OF_MODEL] if self.gate == OF_MODEL else [*self.layers, *self.mixed_heads]


def write_mixture(parts: MixtureParts, path: str | os.PathLike) -> Path:
    """Write both files into the folder ``path``; a mixture that is there is replaced whole or not at all.

    Raises:
        ConfigError: the folder holds an adapter, which a reader would take for the mixture; or a model or a run.
        RankallocError: it cannot be written; its content is unchanged then.
    """
    folder = Path(path)
    require_destination(folder)
    if (folder / CONFIG_NAME).exists():
        raise ConfigError(
            f"{path} holds an adapter ({CONFIG_NAME}), which every other reader would take for the mixture; give "
            "another folder to write to"
        )
    text = json.dumps(_description(parts), indent=2, sort_keys=True) + "\n"
    tensors = {key: value.detach() for key, value in _tensors(parts).items()}
    about = {"format": "pt", _HASH: sha256_of(text)}
    if parts.fingerprint is not None:
        about[fingerprint.KEY] = parts.fingerprint
    with replacing(folder / MIXTURE_WEIGHTS) as temporary:
        specs = {key: Spec.of(value) for key, value in tensors.items()}
        write_stream(temporary, specs, about, tensors.__getitem__)
        with replacing(folder / MIXTURE_NAME) as description:
            description.write_text(text, encoding="utf-8")
    return folder


def read_mixture(path: str | os.PathLike) -> MixtureParts:
    """Read what :func:`write_mixture` wrote.

    Raises:
        AdapterFileError: the folder holds no mixture, one of a later version, or a damaged one.
    """
    folder = Path(path)
    try:
        text = (folder / MIXTURE_NAME).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        what = "a plain adapter; load it with rankalloc.load" if (folder / CONFIG_NAME).exists() else "something else"
        raise AdapterFileError(f"{folder} holds no {MIXTURE_NAME}, so it is not a mixture but {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{folder / MIXTURE_NAME} is damaged: {error}") from None
    about = _described(text, folder)
    if not (folder / MIXTURE_WEIGHTS).is_file():
        raise AdapterFileError(f"{folder} holds no {MIXTURE_WEIGHTS}")
    file = TensorFile(folder / MIXTURE_WEIGHTS)
    if file.metadata.get(_HASH) != sha256_of(text):
        raise AdapterFileError(
            f"{folder}: {MIXTURE_NAME} and {MIXTURE_WEIGHTS} are not of one save (an interrupted save, or an edited "
            "description); save the mixture again"
        )
    return _Reader(folder, about, file).parts()


def _description(parts: MixtureParts) -> dict[str, Any]:
    return {
        "format": FORMAT, "version": VERSION, "adapters": parts.adapters, "gate": parts.gate,
        "activation": parts.activation, "base_model_name_or_path": parts.base,
        "layers": {
            name: {"d_in": updates[0].Q.shape[1], "d_out": updates[0].P.shape[0], "ranks": [u.rank for u in updates]}
            for name, updates in parts.layers.items()
        },
        "heads": {name: sorted(state) for name, state in parts.heads.items()},
        "mixed_heads": {name: bias is not None for name, (_, bias) in parts.mixed_heads.items()},
    }


def _tensors(parts: MixtureParts) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, updates in parts.layers.items():
        found[f"{name}.P"] = torch.cat([update.P for update in updates], 1)
        found[f"{name}.Q"] = torch.cat([update.Q for update in updates])
        found[f"{name}.lam"] = torch.cat([_diagonal(update) for update in updates])
    for name, pair in parts.gates.items():
        found |= _named(f"{name}.gate", pair)
    for name, pair in parts.mixed_heads.items():
        found |= _named(f"{name}.heads", pair)
    for name, state in parts.heads.items():
        found |= {f"{name}.head.{key}": value for key, value in state.items()}
    return found


def _named(prefix: str, pair: Pair) -> dict[str, torch.Tensor]:
    weight, bias = pair
    return {f"{prefix}.weight": weight} | ({} if bias is None else {f"{prefix}.bias": bias})


def _diagonal(update: Factors) -> torch.Tensor:
    """Λ s in the dtype of P."""
    lam = torch.ones(update.rank, device=update.P.device) if update.lam is None else update.lam
    return (lam * update.scaling).to(update.P.dtype)


def _described(text: str, folder: Path) -> dict[str, Any]:
    """The description, checked as far as it goes alone."""
    try:
        about = json.loads(text)
    except RecursionError:
        raise AdapterFileError(f"{folder / MIXTURE_NAME} is damaged: it is nested too deep") from None
    except ValueError as error:  # of JSON, and of numbers with thousands of digits
        raise AdapterFileError(f"{folder / MIXTURE_NAME} is damaged: {str(error)[:200]}") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise AdapterFileError(f"{folder / MIXTURE_NAME} does not describe a mixture of rankalloc's")
    if about.get("version") != VERSION:
        raise AdapterFileError(
            f"{folder} is a mixture of format version {about.get('version')!r}, and this version of rankalloc reads "
            f"{VERSION}; update rankalloc"
        )
    return about


class _Reader:
    """The tensors of one file, taken as its description says."""

    def __init__(self, folder: Path, about: Mapping[str, Any], file: TensorFile) -> None:
        self.folder, self.about, self.file = folder, about, file

    def parts(self) -> MixtureParts:
        about = self.about
        try:
            names, gate = [str(name) for name in about["adapters"]], str(about["gate"])
            layers = {str(name): self._updates(name, layer) for name, layer in about["layers"].items()}
            parts = MixtureParts(
                names, gate, str(about["activation"]), layers, base=about.get("base_model_name_or_path"),
                fingerprint=self.file.metadata.get(fingerprint.KEY),
                heads={
                    str(name): {key: self._tensor(f"{name}.head.{key}") for key in keys}
                    for name, keys in about["heads"].items()
                },
                mixed_heads={
                    str(name): self._pair(f"{name}.heads", bias) for name, bias in about["mixed_heads"].items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterFileError(f"{self.folder / MIXTURE_NAME} is damaged ({error!r})") from None
        if not names or gate not in GATES or any(len(updates) != len(names) for updates in layers.values()):
            raise AdapterFileError(f"{self.folder / MIXTURE_NAME} is damaged: its adapters and ranks do not agree")
        for name in parts.gated():
            weight, bias = self._pair(f"{name}.gate", True)
            if weight.dim() != 2 or len(weight) != len(names) or bias is None or bias.shape != (len(names),):
                raise AdapterFileError(f"{self.folder}: the gate of {name} is not one over {len(names)} adapters")
            parts.gates[name] = weight, bias
        return parts

    def _updates(self, name: str, about: Mapping[str, Any]) -> list[Factors]:
        d_in, d_out, ranks = int(about["d_in"]), int(about["d_out"]), [int(rank) for rank in about["ranks"]]
        if min(ranks, default=0) < 0:
            raise ValueError(f"a rank of {min(ranks)}")
        total = sum(ranks)
        p = self._tensor(f"{name}.P", (d_out, total))
        q = self._tensor(f"{name}.Q", (total, d_in))
        lam = self._tensor(f"{name}.lam", (total,))
        each = zip(p.split(ranks, 1), q.split(ranks), lam.split(ranks), strict=True)
        return [Factors(*factors) for factors in each]

    def _pair(self, key: str, with_bias: bool) -> Pair:
        return self._tensor(f"{key}.weight"), self._tensor(f"{key}.bias") if with_bias else None

    def _tensor(self, key: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        if key not in self.file.specs:
            raise AdapterFileError(f"{self.folder} is incomplete: {MIXTURE_WEIGHTS} has no {key}")
        value = self.file[key]
        if shape is not None and tuple(value.shape) != shape:
            raise AdapterFileError(
                f"{self.folder}: {key} has the shape {tuple(value.shape)}, and {MIXTURE_NAME} says {shape}"
            )
        if value.is_floating_point() and not math.isfinite(float(value.double().abs().sum())):
            raise AdapterFileError(f"{self.folder}: {key} is not finite (NaN or inf)")
        return value
