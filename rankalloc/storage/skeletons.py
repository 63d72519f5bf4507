"""A model without its weights, built from its configuration on the meta device: names and shapes of its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError
from .quiet import quiet


def build_skeleton(model: str, trust_remote_code: bool = False) -> nn.Module:
    """The model in folder (or of hub id) ``model`` on the meta device, in the class that its configuration names.

    Raises:
        ConfigError: there is no such model, or it cannot be built.
    """
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
            _require_buildable(config)
            own_class = None if getattr(config, "auto_map", None) else _class_named_in(config)
            if own_class is not None:
                return own_class(config)
            return _auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    # a damaged config.json fails in whatever way the model's own code trips over it
    except Exception as error:
        raise ConfigError(_why(model, error, trust_remote_code)) from error


MOST_BLOCKS = 2_000
"""Blocks, and experts in one, that a model is built with: every one of them is a module in memory."""


def _require_buildable(config: PreTrainedConfig) -> None:
    """Raise ValueError when the configuration asks for more blocks or experts than any model has."""
    parts = [config.to_dict()]
    while parts:
        part = parts.pop()
        for key, value in part.items():
            if isinstance(value, dict):
                parts.append(value)
            counted = str(key).endswith(("_layers", "_layer", "_experts", "_blocks", "depth"))
            if counted and isinstance(value, int) and value > MOST_BLOCKS:
                raise ValueError(f"its configuration says {key}={value:,}, and no model has more than {MOST_BLOCKS:,}")


def _class_named_in(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    for name in config.architectures or []:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return None


def _auto_class(config: PreTrainedConfig) -> Any:
    names = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModel")]
    return getattr(transformers, names[0], AutoModel) if names else AutoModel


def _why(model: str, error: Exception, trusted: bool) -> str:
    why = " ".join(str(error).split())
    why = why if len(why) < 200 else why[:196] + " ..."
    if not trusted and "trust_remote_code" in str(error):
        return f"model {model!r} brings its own code; if you trust it, add --trust-remote-code"
    if Path(model).is_dir():
        return f"model folder {model!r} cannot be read: {why or type(error).__name__}"
    if Path(model).is_absolute() or model.startswith("."):
        return f"no model folder at {model!r}; give a folder with a config.json"
    return f"model {model!r} is not a local folder and could not be fetched from the model hub ({why})"
