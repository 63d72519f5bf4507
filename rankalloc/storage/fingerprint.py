"""Fingerprints of base models, so that an adapter is not put on another base of the same shapes.

A fingerprint has three parts: the fields of the model's configuration that decide what it computes, 8 numbers from each
of up to 48 frozen weight matrices, and the precision they were read in. Matrices are chosen in the order of the hashes
of their names (every k-th would always hit the same kind of layer), numbers evenly over each. Embeddings, output heads
and all trained weights are left out: a vocabulary may grow, and most tasks have a new head.

A base in another precision is the same base, so numbers are compared and not their bits:

    both in floating point     |a − b| ≤ 2u·max(|a|, |b|) for every number, u the unit roundoff of the coarser type
    one of them quantised      ‖a − b‖ / ‖a‖ over all numbers, each matrix scaled to size 1, at most 0.05 for 8 bits
                               and 0.3 for fewer (NF4 is at 0.1; two unrelated models are at 1.4)

Cost: reading a few hundred numbers; for a quantised base, 48 matrices are de-quantised one by one. Known weakness: a
light fine-tune cannot be distinguished from a quantised base of the same model: it differs by more than rounding, but
by less than four bits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.adapter_set import Adapters
from ..adapters.mixed import Gated
from ..errors import AdapterFileError
from ..files import sha256_of
from ..layers.missing import missing_parameters
from ..layers.quantized import dequantized, scheme_of
from ..layers.sharding import has_shards
from ..layers.targets import output_embeddings
from ..layers.tuners import is_tuner_layer
from .tensors import read_header

KEY = "rankalloc_base"
VERSION = 1
_MATRICES, _NUMBERS = 48, 8
_ROUNDOFF = {"float64": 2.0**-24, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_SUBNORMAL = 1e-7  # float16 has no relative precision below
_QUANTISED = {"8bit": 0.05}
_FEW_BITS = 0.3
_FIELDS = (
    "model_type", "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "num_layers",
    "num_attention_heads", "n_head", "num_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "n_inner", "d_ff", "hidden_act",
    "activation_function", "hidden_activation", "feed_forward_proj", "rms_norm_eps", "layer_norm_eps",
    "layer_norm_epsilon", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "position_embedding_type",
    "is_decoder", "num_local_experts", "num_experts", "num_experts_per_tok", "attn_logit_softcapping",
    "final_logit_softcapping",
)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A base model's fingerprint; see the module docstring.

    Attributes:
        config: {field: value} of the configuration; {} for a model without one.
        names: of the sampled matrices.
        precision: "float32", "bfloat16", ... or a scheme of :mod:`rankalloc.layers.quantized`.
        samples: (matrices, 8) float32.
    """

    config: dict[str, Any]
    names: tuple[str, ...]
    precision: str
    samples: np.ndarray

    @property
    def id(self) -> str:
        """16 hex digits that differ between bases, and between precisions of one base."""
        return sha256_of(self.encode())[:16]

    def encode(self) -> str:
        """The fingerprint as one line of JSON; equal fingerprints give equal text."""
        numbers = base64.b64encode(self.samples.astype("<f4").tobytes()).decode("ascii")
        content = {"version": VERSION, "config": self.config, "precision": self.precision, "names": list(self.names),
                   "samples": numbers}
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> Fingerprint:
        """Read the text of :meth:`encode`. Raises ValueError when it is damaged or of a later version."""
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ValueError("a fingerprint of an unknown version")
        try:
            names = tuple(map(str, content["names"]))
            samples = np.frombuffer(base64.b64decode(content["samples"], validate=True), "<f4").reshape(len(names), -1)
            return cls(dict(content["config"]), names, str(content["precision"]), samples)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a damaged fingerprint ({error})") from None


def fingerprint(model: nn.Module | Adapters) -> Fingerprint | None:
    """The fingerprint of ``model``, or of the base under ``Adapters``.

    None when it has no weights to read: all are trained, on the meta device, or sharded.
    """
    model = model.model if isinstance(model, Adapters) else model
    frozen = {
        name: layer for name, layer in matrices(model).items() if not weight_of(layer).requires_grad or _alone(model)
    }
    if not frozen or has_shards(model):  # weights that are whole at the moment say nothing about the others
        return None
    names = _drawn(frozen)
    samples = np.stack([_numbers(_full(frozen[name])) for name in names])
    return Fingerprint(_config_of(model), names, _precision(frozen[name] for name in names), samples)


def of_weights(
    names: Iterable[str], weight: Callable[[str], torch.Tensor], config: Mapping[str, Any]
) -> Fingerprint:
    """The fingerprint of a base whose weights are in a file: ``weight(name)`` reads that of a module.

    A ``config`` from a file lacks the fields that it leaves at their defaults.
    """
    drawn = _drawn(names)
    dtypes: set[str] = set()
    samples: list[np.ndarray] = []
    for name in drawn:
        tensor = weight(name)
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        samples.append(_numbers(tensor))
    return Fingerprint(_fields(config), drawn, max(dtypes, key=_coarseness), np.stack(samples))


def read(path: str | os.PathLike) -> Fingerprint | None:
    """The fingerprint in an adapter's weights file; None when it has none.

    Raises:
        AdapterFileError: the file, or the fingerprint in it, is damaged.
    """
    return named_in(read_header(path).metadata, path)


def named_in(metadata: Mapping[str, str], path: str | os.PathLike) -> Fingerprint | None:
    """As :func:`read`, for the metadata of a file that is read already."""
    try:
        return Fingerprint.decode(metadata[KEY]) if KEY in metadata else None
    except ValueError as error:
        raise AdapterFileError(f"{path} is damaged or truncated ({error})") from None


def check(model: nn.Module, path: str | os.PathLike) -> str | None:
    """Make sure that ``model`` is the base that the adapter file at ``path`` was made for.

    Returns:
        "same", "another precision", or None when the file names no base.

    Raises:
        AdapterFileError: it is another base, or the file is damaged.
    """
    wanted = read(path)
    return None if wanted is None else compare(wanted, model, str(path))


def compare(
    wanted: Fingerprint, model: nn.Module, what: str = "the adapter", modules: Mapping[str, nn.Module] | None = None
) -> str | None:
    """As :func:`check`, for a fingerprint that is read already.

    ``modules`` are the :func:`matrices` of a model that has been wrapped since; None finds them.
    """
    grade, why = relation(wanted, model, modules)
    if grade == "another":
        raise AdapterFileError(
            f"{what} was made for another base model: {why}; load the base it was trained on, or pass "
            "check_base=False if you know that this is the right one"
        )
    return grade


def relation(
    wanted: Fingerprint, model: nn.Module, modules: Mapping[str, nn.Module] | None = None
) -> tuple[str | None, str]:
    """As :func:`relate`, for a fingerprint and a model, whose matrices of the same names are compared."""
    modules = matrices(model) if modules is None else modules
    names = tuple(name for name in wanted.names if name in modules)
    samples = np.stack([_numbers(_full(modules[name])) for name in names]) if names else np.zeros((0, _NUMBERS))
    here = Fingerprint(_config_of(model), names, _precision(modules[name] for name in names), samples)
    return relate(wanted, here)


def relate(theirs: Fingerprint, ours: Fingerprint) -> tuple[str | None, str]:
    """Compare two fingerprints.

    Returns:
        "same", "another precision", "another" with the reason, or None when they have no matrix in common.
    """
    for field in sorted(theirs.config.keys() & ours.config.keys()):
        if theirs.config[field] != ours.config[field]:
            return "another", f"{field} is {theirs.config[field]!r} there and {ours.config[field]!r} here"
    places = {name: i for i, name in enumerate(ours.names)}
    rows = [(i, places[name]) for i, name in enumerate(theirs.names) if name in places]
    if not rows:
        return None, ""
    one = theirs.samples[[i for i, _ in rows]].astype(np.float64)
    two = ours.samples[[i for _, i in rows]].astype(np.float64)
    if np.array_equal(one, two):
        return "same", ""
    off = _distance(one, two)
    grades = {theirs.precision, ours.precision}
    if grades <= _ROUNDOFF.keys():
        u = max(_ROUNDOFF[grade] for grade in grades)
        close = bool((np.abs(one - two) <= 2 * u * np.maximum(np.abs(one), np.abs(two)) + _SUBNORMAL).all())
    else:
        close = off <= max(_QUANTISED.get(grade, _FEW_BITS) for grade in grades - _ROUNDOFF.keys())
    if not close:
        return "another", (
            f"the frozen weights differ by {100 * off:.2g} % ({theirs.precision} there, {ours.precision} here)"
        )
    return ("same" if len(grades) == 1 else "another precision"), ""


def _distance(theirs: np.ndarray, ours: np.ndarray) -> float:
    size = np.sqrt((theirs**2).mean(1, keepdims=True))
    size[size == 0] = 1.0
    whole = np.linalg.norm(theirs / size)
    difference = np.linalg.norm((theirs - ours) / size)
    return float(difference / whole) if whole else float(difference)


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """{name without wrappers: layer} of layers with a readable weight matrix, without embeddings and output heads."""
    output = output_embeddings(model)
    inside = {id(part) for m in model.modules() if _is_adapted(m) for part in m.modules() if part is not m}
    drawn = {id(parameter) for parameter in missing_parameters(model).values()}  # at random, so not the base's
    found = {}
    for name, module in model.named_modules():
        layer = _base_of(module) if _is_adapted(module) else module
        weight = getattr(layer, "_parameters", {}).get("weight")
        if weight is None or id(weight) in drawn or id(module) in inside:
            continue
        if layer is output or isinstance(layer, nn.Embedding):
            continue
        plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.dim() >= 2
        if (plain or scheme_of(layer)) and weight.numel() and weight.device.type != "meta":
            found[name] = layer
    return found


def _is_adapted(module: nn.Module) -> bool:
    """Whether this is a layer with an adapter, ours or PEFT's."""
    return isinstance(module, (Adapter, Gated)) or is_tuner_layer(module)


def _base_of(module: Any) -> nn.Module:
    return module.base_layer if isinstance(module, (Adapter, Gated)) else module.get_base_layer()


def _alone(model: nn.Module) -> bool:
    """Whether no adapters are attached, so that nothing is frozen yet and every weight belongs to the base."""
    return not any(_is_adapted(module) for module in model.modules())


def _drawn(names: Iterable[str]) -> tuple[str, ...]:
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest())
    return tuple(by_hash[:_MATRICES])


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight of one of the :func:`matrices`."""
    return cast(torch.Tensor, layer.weight)


def _full(layer: nn.Module) -> torch.Tensor:
    return dequantized(layer) if scheme_of(layer) else weight_of(layer).detach()


def _numbers(weight: torch.Tensor) -> np.ndarray:
    """(8,) float32: numbers spread evenly over the weight, repeated if it has fewer."""
    where = (torch.arange(_NUMBERS) * weight.numel()) // _NUMBERS
    index = torch.unravel_index(where.to(weight.device), weight.shape)
    return weight[index].float().cpu().numpy()


def _precision(layers: Iterable[nn.Module]) -> str:
    """The coarsest precision among ``layers``."""
    found = {scheme_of(layer) or str(weight_of(layer).dtype).removeprefix("torch.") for layer in layers}
    return max(found, key=_coarseness, default="float32")


def _coarseness(precision: str) -> float:
    return _ROUNDOFF.get(precision, _QUANTISED.get(precision, _FEW_BITS))


def name_of(model: nn.Module) -> str | None:
    """The name or folder that transformers loaded ``model`` from; None for other models."""
    named = getattr(getattr(model, "config", None), "_name_or_path", None)
    return named or getattr(model, "name_or_path", None) or None


def _config_of(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    return _fields(config.to_dict() if hasattr(config, "to_dict") else config if isinstance(config, Mapping) else {})


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    return {field: _plain(values[field]) for field in _FIELDS if values.get(field) is not None}


def _plain(value: Any) -> Any:
    """``value`` as it comes back from JSON."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))
