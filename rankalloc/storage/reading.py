"""Reading a finished adapter from its folder, without a model: a PEFT LoRA, a PEFT AdaLoRA, or rankalloc's own.

Opening one reads names, shapes and scales alone. The factors of a layer are read when they are asked for, so an
adapter of any size can be processed in the memory of one layer.

    LoRA      ΔW = s · lora_B lora_A                  s = alpha / r, or alpha / √r with use_rslora
    AdaLoRA   ΔW = s · lora_B diag(lora_E) lora_A     s = alpha / (init_r + 1e-5), as PEFT computes it; the file omits
              the ranks that AdaLoRA dropped, and PEFT ignores use_rslora and alpha_pattern there
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter_set import SCALES
from ..errors import AdapterFileError
from ..files import sha256_of
from ..layer_names import natural_key
from ..lowrank import Factors
from .folder import CONFIG_NAME, NESTED_KEY, OTHER_KINDS, PREFIX, WEIGHTS_NAME
from .patterns import by_pattern
from .peft_keys import require_plain
from .peft_names import KEY, is_parameter, plain_name, stacks_in
from .tensors import Spec, TensorFile, refuse_pickles
from .triplets import triplet_sizes

PEFT_TYPES = {
    "LORA": (re.compile(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))"), "AB"),
    "ADALORA": (re.compile(r"(.+)\.lora_([ABE])"), "ABE"),
}
"""{peft_type: (the pattern of its keys, the parts that make a layer)}."""

_EXPONENTS = {f"{exponent:g}": exponent for exponent in (*SCALES.values(), 0.0)}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class StoredLayer:
    """One adapted layer as the file holds it.

    Attributes:
        rank: of its factors, zero padding included.
        scaling: s.
        keys: {part A, B (and E): key in the file}.
        plain: whether both factors are matrices, as a linear layer's are and a convolution's are not.
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    scaling: float
    dtype: torch.dtype
    keys: Mapping[str, str]
    plain: bool = True

    @property
    def ends(self) -> tuple[str, str]:
        """What the keys of parts A and B have after the layer's name."""
        embedding = "lora_embedding_A" in self.keys["A"]
        return ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")


class FinishedAdapter:
    """The adapter in ``folder``, or in the ``adapter`` folder of a run.

    Attributes:
        folder: where its two files are.
        config: its adapter_config.json.
        layers: {layer name: :class:`StoredLayer`} in natural order, layer 10 after layer 9.
        heads: {name of a tensor that is not an adapter weight, as in the model's state dict: key in the file}.
        metadata: of the weights file.
        stacks: {module of stacked experts, as in the file: {part: key}}
            (:func:`rankalloc.storage.expert_reading.read_stacks`).

    Args:
        experts: names of the modules with stacked experts in the model to load into; without a model None, and an
            adapter of experts is refused.

    Raises:
        AdapterFileError: a file is missing, truncated or pickled; the adapter is of a type other than those above, or
            trained something that low-rank factors cannot express (the message names it).

    Example:
        >>> import tempfile, torch, rankalloc as ra
        >>> adapters = ra.attach(torch.nn.Sequential(torch.nn.Linear(8, 4)), rank=2)
        >>> folder = ra.save(adapters, tempfile.mkdtemp())
        >>> ra.FinishedAdapter(folder).factors("0").P.shape
        torch.Size([4, 2])
    """

    def __init__(self, folder: str | os.PathLike, experts: Collection[str] | None = None) -> None:
        self.folder = _adapter_folder(Path(folder))
        self.config = read_config(self.folder, experts)
        self._file = _open_weights(self.folder)
        self.metadata = self._file.metadata
        parts, self.heads = _split(self._file, self.config["peft_type"], self.folder)
        self.stacks = {name: parts.pop(name) for name in list(parts) if plain_name(name) in (experts or ())}
        self.layers = {name: self._layer(name, parts[name]) for name in sorted(parts, key=natural_key)}

    def _layer(self, name: str, keys: Mapping[str, str]) -> StoredLayer:
        shapes = {part: self._file.specs[key].shape for part, key in keys.items()}
        plain = all(len(shapes[part]) == 2 for part in "AB")
        (rank, *into), (d_out, *columns) = shapes["A"], shapes["B"]
        if plain and (rank != columns[0] or shapes.get("E", (rank, 1)) != (rank, 1)):
            raise AdapterFileError(f"{self.folder}: the factors of {name} do not fit each other")
        d_in = math.prod(into)
        scaling = _adalora_scale if "E" in keys else _lora_scale
        known_as = f"{name}.weight" if is_parameter(name, self.config.get(KEY) or ()) else name
        scale = scaling(self.config, known_as, rank, self.folder)
        dtype = torch.promote_types(self._file.specs[keys["A"]].dtype, self._file.specs[keys["B"]].dtype)
        if not dtype.is_floating_point:
            raise AdapterFileError(f"{self.folder}: the weights of {name} are {dtype}, not floating-point numbers")
        return StoredLayer(name, d_in, d_out, rank, scale, dtype, keys, plain)

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor by its key in the file."""
        return self._file[key]

    def scaling_of(self, name: str, rank: int) -> float:
        """PEFT's scale of a LoRA of this rank on the layer or parameter ``name``.

        Raises AdapterFileError when the configuration gives another rank."""
        return _lora_scale(self.config, name, rank, self.folder)

    def raw(self, name: str, part: str) -> torch.Tensor:
        """Part A, B or E of a layer, in the shape it has in the file."""
        return self._file[self.layers[name].keys[part]]

    def shape(self, name: str, part: str) -> tuple[int, ...]:
        """The shape in the file of part A, B or E of a layer."""
        return self._file.specs[self.layers[name].keys[part]].shape

    def stored(self, name: str) -> Factors:
        """The factors of one layer as the file holds them: unchecked, with zero padding, the scale kept apart.

        Raises:
            AdapterFileError: they are not matrices.
        """
        layer = self.layers[name]
        if not layer.plain:
            shape = tuple(self._file.specs[layer.keys["A"]].shape)
            raise AdapterFileError(
                f"{self.folder}: {layer.keys['A']} has the shape {shape}, not that of a linear layer; convolutions "
                "cannot be processed without their model"
            )
        lam = self.raw(name, "E").flatten() if "E" in layer.keys else None
        return Factors(self.raw(name, "B"), self.raw(name, "A"), lam, layer.scaling)

    def factors(
        self, name: str, unpack: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    ) -> Factors:
        """The factors of one layer, checked and without zero padding.

        Args:
            unpack: turns parts A and B from their shapes in the file into matrices (r, d_in) and (d_out, r).

        Raises:
            AdapterFileError: a weight is NaN or infinite.
        """
        if unpack is None:
            held = self.stored(name)
        else:
            lora_a, lora_b = unpack(self.raw(name, "A"), self.raw(name, "B"))
            held = Factors(lora_b, lora_a, None, self.layers[name].scaling)
        lora_a, lora_b, lam = held.Q, held.P, held.lam
        of_a, of_b = triplet_sizes(lora_a, lora_b, lam, f"{self.folder}: the weights of {name}")
        used = (of_a != 0) | (of_b != 0)
        if not used.all():
            lora_a, lora_b, lam = lora_a[used], lora_b[:, used], None if lam is None else lam[used]
        return Factors(lora_b, lora_a, lam, held.scaling)

    def head(self, name: str) -> torch.Tensor:
        """A tensor of :attr:`heads`. Raises AdapterFileError when a number in it is not finite."""
        value = self._file[self.heads[name]]
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AdapterFileError(f"{self.folder}: {name} is not finite (NaN or inf)")
        return value

    def spec(self, head: str) -> Spec:
        """Shape and dtype of a tensor of :attr:`heads`."""
        return self._file.specs[self.heads[head]]

    def head_sources(self) -> dict[str, tuple[Spec, Callable[[], torch.Tensor]]]:
        """{name: its spec and a function that reads it} of all :attr:`heads`, as a writer takes them."""
        return {name: (self.spec(name), partial(self.head, name)) for name in self.heads}

    @property
    def label(self) -> str:
        """Its name in messages."""
        return str(self.folder)

    @property
    def base(self) -> str | None:
        """The name of the base model in the adapter's configuration; None without one."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def nested_exponent(self) -> float | None:
        """e of a nested adapter: the first b of a layer's r triplets are an adapter too, at (r / b)^e times the scale.

        None when the file is not marked as nested, or with an exponent that this version does not know.
        """
        return _EXPONENTS.get(self.metadata.get(NESTED_KEY, ""))

    def bytes_per_param(self) -> int | None:
        """Size of one weight in bytes; None when the layers differ in it."""
        sizes = {layer.dtype.itemsize for layer in self.layers.values()}
        return sizes.pop() if len(sizes) == 1 else None


def _adapter_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise AdapterFileError(f"no adapter folder at {folder}")
    inner = folder / "adapter"  # where a run keeps its adapter
    return inner if not (folder / CONFIG_NAME).exists() and (inner / CONFIG_NAME).exists() else folder


def read_config(folder: Path, experts: Collection[str] | None = None) -> dict[str, Any]:
    """The adapter_config.json in ``folder``; one of stacked experts only for a model that has some.

    Raises AdapterFileError when it is missing, damaged or not supported.
    """
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterFileError(f"{folder} {_what_else(folder)}") from None
    except RecursionError:
        raise AdapterFileError(f"{folder / CONFIG_NAME} is damaged: it is nested too deep") from None
    except (ValueError, OSError) as error:  # of the encoding, of JSON, and of numbers with thousands of digits
        raise AdapterFileError(f"{folder / CONFIG_NAME} is damaged: {str(error)[:200]}") from None
    if not isinstance(config, dict) or config.get("peft_type") not in PEFT_TYPES:
        kind, known = config.get("peft_type") if isinstance(config, dict) else config, " and ".join(PEFT_TYPES)
        raise AdapterFileError(f"{folder} is an adapter of type {kind!r}; this version reads {known}")
    require_plain(config, str(folder))
    if (stacks := stacks_in(config)) and not experts:
        more = f" and {len(stacks) - 1} more" if stacks[1:] else ""
        if experts is not None:
            raise AdapterFileError(
                f"{folder} was made for another model: it adapts stacked experts ({stacks[0]}{more}), and this one has "
                "none"
            )
        raise AdapterFileError(
            f"{folder} adapts experts stacked in one tensor ({stacks[0]}{more}), whose number only the model tells; "
            "rankalloc.load puts it into its model, and tools that work on files alone cannot read it"
        )
    init = str(config.get("init_lora_weights"))
    if init.startswith(_CHANGES_BASE):
        raise AdapterFileError(
            f"{folder} was made with init_lora_weights={init!r}, which changes the frozen weights too; have PEFT "
            "convert it to plain LoRA (path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        raise AdapterFileError(f"{folder} trained biases (bias={config['bias']!r}), which rankalloc does not carry")
    return config


def _what_else(folder: Path) -> str:
    """What a folder without an adapter_config.json holds, in the words of a message."""
    held = {name for place in (folder, folder / "adapter") for name in OTHER_KINDS if (place / name).exists()}
    return next((OTHER_KINDS[name] for name in sorted(held)), f"holds no {CONFIG_NAME}, so it is not an adapter")


def _open_weights(folder: Path) -> TensorFile:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        refuse_pickles(folder)
        raise AdapterFileError(f"{folder} holds no {WEIGHTS_NAME}")
    file = TensorFile(path)
    expected = file.metadata.get("rankalloc_config")
    if expected and expected != sha256_of((folder / CONFIG_NAME).read_text(encoding="utf-8")):
        raise AdapterFileError(
            f"{folder}: {CONFIG_NAME} and {WEIGHTS_NAME} are not of one save (an interrupted save, or an edited "
            "config); save the adapter again"
        )
    return file


def _split(file: TensorFile, kind: str, folder: Path) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Sort the file's keys into {layer: {part: key}} and {other tensor: key}."""
    pattern, wanted = PEFT_TYPES[kind]
    layers: dict[str, dict[str, str]] = {}
    rest = {}
    for key in file.specs:
        name = key.removeprefix(PREFIX)
        match = pattern.fullmatch(name)
        if match:
            part = next(group for group in match.groups()[1:] if group)
            layers.setdefault(match[1], {})[part] = key
        elif "lora_" in name:
            raise AdapterFileError(f"{folder}: {key} is a kind of adapter weight that this version does not read")
        else:
            rest[name] = key
    for name, parts in layers.items():
        if len(parts) != len(wanted):
            held, missing = (" and ".join(f"lora_{p}" for p in wanted if (p in parts) == has) for has in (True, False))
            raise AdapterFileError(f"{folder} is incomplete: {name} has {held} but no {missing}")
    if not layers:
        raise AdapterFileError(f"{folder} holds no LoRA weights")
    return layers, rest


def _lora_scale(config: Mapping[str, Any], name: str, rank: int, folder: Path) -> float:
    """PEFT's scale of one module: alpha / r, where the first pattern (a regular expression) that matches decides."""
    try:
        alpha = float(by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
        named = by_pattern(config.get("rank_pattern"), name, config.get("r", rank))
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise AdapterFileError(
            f"{folder / CONFIG_NAME} is damaged: lora_alpha, alpha_pattern or rank_pattern cannot be read ({error})"
        ) from None
    _check_rank(named, rank, name, folder)
    if not rank:
        return 1.0
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _adalora_scale(config: Mapping[str, Any], name: str, rank: int, folder: Path) -> float:
    try:
        alpha, first = float(config.get("lora_alpha", 8)), int(config.get("init_r", 12))
        mask = (config.get("rank_pattern") or {}).get(f"{name}.lora_E")
        _check_rank(first if mask is None else sum(map(bool, mask)), rank, name, folder)
        return (alpha if alpha > 0 else float(first)) / (first + 1e-5)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise AdapterFileError(
            f"{folder / CONFIG_NAME} is damaged: lora_alpha, init_r or rank_pattern cannot be read ({error})"
        ) from None


def _check_rank(named: Any, rank: int, name: str, folder: Path) -> None:
    if named != rank:
        raise AdapterFileError(
            f"{folder}: {CONFIG_NAME} and {WEIGHTS_NAME} do not fit each other: {name} has rank {named} in the first "
            f"and {rank} in the second"
        )

