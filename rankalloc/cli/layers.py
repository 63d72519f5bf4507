"""The adaptable layers of a model, read from its configuration alone: it is built on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..base_layers import shape_of
from ..errors import ConfigError
from ..layer_names import places
from ..targets import ALL_LINEAR, find_heads, find_targets, unadapted
from ..tasks.models import quiet
from ..tasks.packages import MINILM, minilm_folder


@dataclass(frozen=True)
class LayerGroup:
    """Layers with the same place in their block and the same shape. ``params_per_rank`` is what one
    rank costs in one layer (d_in + d_out), ``params_all`` what it costs in all of them."""

    suffix: str
    layers: int
    d_in: int
    d_out: int
    params_per_rank: int
    params_all: int


@dataclass(frozen=True)
class Adaptable:
    """What "all-linear" adapts in a model, its heads with their parameters, and what cannot be adapted."""

    architecture: str
    groups: list[LayerGroup]
    heads: dict[str, int]
    notes: list[str]


def adaptable(model: str, trust_remote_code: bool = False) -> Adaptable:
    """What can be adapted in a model folder, a hub id or the named example model.

    Raises:
        ConfigError: there is no such model, or it cannot be built.
        TargetError: it has no layer that can be adapted.
    """
    skeleton = build_skeleton(model, trust_remote_code)
    heads = find_heads(skeleton)
    found = find_targets(skeleton, ALL_LINEAR, heads=heads)
    groups: dict[tuple[str, int, int], int] = {}
    for module, (_, role) in zip(found.values(), places(list(found)), strict=True):
        key = (role, *shape_of(module))
        groups[key] = groups.get(key, 0) + 1
    return Adaptable(
        architecture=type(skeleton).__name__,
        groups=[
            LayerGroup(role, amount, d_in, d_out, d_in + d_out, amount * (d_in + d_out))
            for (role, d_in, d_out), amount in groups.items()
        ],
        heads={name: sum(p.numel() for p in skeleton.get_submodule(name).parameters()) for name in heads},
        notes=unadapted(skeleton, ALL_LINEAR),
    )


def build_skeleton(model: str, trust_remote_code: bool = False) -> nn.Module:
    """The model without weights, on the meta device, in the class its configuration names."""
    reference = str(minilm_folder()) if model == MINILM else model
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(reference, trust_remote_code=trust_remote_code)
            own_class = None if getattr(config, "auto_map", None) else _class_named_in(config)
            if own_class is not None:
                return own_class(config)
            return _auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    # A damaged config.json fails in whatever way the model's own code trips over it.
    except Exception as error:
        raise ConfigError(_why(model, reference, error, trust_remote_code)) from error


def _class_named_in(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    for name in config.architectures or []:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return None


def _auto_class(config: PreTrainedConfig) -> type:
    names = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModel")]
    return getattr(transformers, names[0], AutoModel) if names else AutoModel


def _why(model: str, reference: str, error: Exception, trusted: bool) -> str:
    why = " ".join(str(error).split())
    why = why if len(why) < 200 else why[:196] + " ..."
    if not trusted and "trust_remote_code" in str(error):
        return f"model {model!r} brings its own code; if you trust it, add --trust-remote-code"
    if Path(reference).is_dir():
        return f"model folder {model!r} cannot be read: {why or type(error).__name__}"
    if Path(reference).is_absolute() or model.startswith("."):
        return f"no model folder at {model!r}; give a folder with a config.json"
    return f"model {model!r} is no local folder and could not be fetched from the model hub ({why})"
