"""The names that other tools give a LoRA's tensors, and the modules of a model that they mean.

    PEFT        base_model.model.{module}.lora_A.weight      (r, d_in)      scale: adapter_config.json
                base_model.model.{module}.lora_B.weight      (d_out, r)
    diffusers   {component}.{module}.lora_A.weight, ….lora_B.weight; older ….lora.down.weight, ….lora.up.weight
                component: unet, transformer, text_encoder, text_encoder_2
    kohya       {lora_unet|lora_te}_{module, "." as "_"}.lora_down.weight, .lora_up.weight, .alpha

``.alpha`` is one number for each module, and the scale is alpha over that module's own rank; without it the scale is 1.
kohya's names lose the dots, so "a.b_c" and "a_b.c" become the same name: only the model's own names tell which one is
meant, and a model that has both is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import AdapterFileError, did_you_mean
from .folder import PREFIX
from .patterns import by_pattern
from .peft_keys import require_plain

METADATA_KEY = "lora_adapter_metadata"
"""The entry of a file's header in which diffusers keeps PEFT's configuration, each key behind its component's name."""

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
KOHYA = {
    "lora_unet": "unet", "lora_transformer": "transformer", "lora_te": "text_encoder", "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2", "lora_te3": "text_encoder_3",
}
_DOWN = ("lora_down", "lora_A", "lora.down", "lora_linear_layer.down", "lora_A.default")
_UP = ("lora_up", "lora_B", "lora.up", "lora_linear_layer.up", "lora_B.default")
_OTHER = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lora_mid": "a CP decomposition",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "oft_blocks": "OFT", "lora_E": "AdaLoRA", "diff": "full differences",
}


@dataclass
class Entry:
    """One module in a file: ``down`` (r, d_in), ``up`` (d_out, r), and ``alpha`` if it has one."""

    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    alpha: float | None = None

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(down, up) of a module that :func:`group` found complete."""
        assert self.down is not None and self.up is not None
        return self.down, self.up


@dataclass
class Component:
    """The entries of one model in a file; ``flat`` when their names have lost the dots."""

    flat: bool
    entries: dict[str, Entry] = field(default_factory=dict)


def group(tensors: Mapping[str, torch.Tensor], what: str) -> dict[str, Component]:
    """Sort the tensors of a file into {component, "" for none: its entries}.

    Raises:
        AdapterFileError: a key is of no known kind, a pair is incomplete, or the names are in two styles.
    """
    found: dict[str, Component] = {}
    for key, tensor in tensors.items():
        stem, part = _split(key, what)
        component, name, flat = _component(stem)
        held = found.setdefault(component, Component(flat))
        if held.flat != flat:
            raise AdapterFileError(f"{what} names its modules in two ways, with and without dots: {key} is one of them")
        entry = held.entries.setdefault(name, Entry())
        if part == "alpha":
            if tensor.numel() != 1:
                raise AdapterFileError(f"{what}: {key} has {tensor.numel()} numbers, and an alpha is one")
            entry.alpha = float(tensor)
        elif getattr(entry, part) is not None:
            raise AdapterFileError(f"{what} holds two tensors for the {part} of {name}: {key} is one of them")
        else:
            setattr(entry, part, tensor)
    for each in found.values():
        for name, entry in each.entries.items():
            if entry.down is None or entry.up is None:
                half = "down" if entry.down is None else "up"
                raise AdapterFileError(f"{what} is incomplete: {name} has no lora_{half}")
    return found


def take_scales(chosen: Component, component: str, metadata: Mapping[str, str], what: str) -> None:
    """Give the entries of a component the alphas that stand in the file's header, as diffusers writes them.

    Raises:
        AdapterFileError: the header's configuration is damaged, or of something else than a plain LoRA.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        return
    try:
        held = json.loads(text)
        prefix = f"{component}." if component else ""
        config = {key.removeprefix(prefix): value for key, value in held.items() if key.startswith(prefix)}
        require_plain({"peft_type": "LORA", **config}, f"the configuration in the header of {what}")
        for name, entry in chosen.entries.items():
            if entry.alpha is None and "lora_alpha" in config:
                rank = len(entry.pair[0])
                alpha = float(by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
                entry.alpha = alpha * rank**0.5 if config.get("use_rslora") else alpha
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterFileError(f"{what}: {METADATA_KEY} in its header is damaged ({str(error)[:120]})") from None


def resolve(names: Iterable[str], flat: bool, modules: Iterable[str], what: str) -> dict[str, str]:
    """{name in the file: full module name}.

    Raises:
        AdapterFileError: a name fits no module, or more than one.
    """
    modules = list(modules)
    by_name: dict[str, list[str]] = {}
    for module in modules:
        by_name.setdefault(flattened(module) if flat else module, []).append(module)
    names = list(names)
    # transformers 5 has a CLIP text encoder's layers without the "text_model" around them, which all files name
    around = "text_model_" if flat else "text_model."
    for name in names:
        bare, full = name.removeprefix(around), around + name
        if name not in by_name and (bare in by_name or full in by_name):
            by_name[name] = by_name[bare if bare in by_name else full]
    missing = [name for name in names if name not in by_name]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise AdapterFileError(
            f"{what} was made for another model: {missing[0]}{more} of {len(names)} names fit no layer here"
            f"{did_you_mean(missing[0], by_name)}"
        )
    several = next((name for name in names if len(by_name[name]) > 1), None)
    if several is not None:
        raise AdapterFileError(
            f"{what}: {several} could be {' or '.join(by_name[several])}, because its name has lost the dots; convert "
            "the file to names with dots, with the tool that made it"
        )
    return {name: by_name[name][0] for name in names}


def flattened(module: str) -> str:
    """A module name as kohya writes it."""
    return module.replace(".", "_")


def kohya_key(module: str, prefix: str) -> str:
    """The stem of a module's keys in a kohya file. A text encoder's layers are named as files have always had them,
    inside its "text_model", which transformers 5 has no more."""
    bare = prefix.startswith("lora_te") and re.match(r"(encoder|embeddings|final_layer_norm)\b", module)
    return f"{prefix}_{'text_model_' if bare else ''}{flattened(module)}"


def _split(key: str, what: str) -> tuple[str, str]:
    """(stem, "down" | "up" | "alpha") of a key."""
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    for part, endings in (("down", _DOWN), ("up", _UP)):
        for ending in endings:
            if key.endswith(f".{ending}.weight"):
                return key.removesuffix(f".{ending}.weight"), part
    last = key.removesuffix(".weight").rsplit(".", 1)[-1]
    kind = f": it belongs to {_OTHER[last]}, not to a plain low-rank pair" if last in _OTHER else ""
    raise AdapterFileError(f"{what}: {key} is a kind of adapter weight that this version does not read{kind}")


def _component(stem: str) -> tuple[str, str, bool]:
    """(component, name, whether the name has lost its dots) of a stem."""
    match = re.fullmatch(r"(lora_(?:unet|transformer|te[123]?)|lycoris)_(.+)", stem)
    if match and "." not in stem:
        return KOHYA.get(match[1], "unet"), match[2], True
    stem = stem.removeprefix(PREFIX)
    first, _, rest = stem.partition(".")
    return (first, rest, False) if rest and first in COMPONENTS else ("", stem, False)
