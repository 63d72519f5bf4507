"""PEFT's models and layers, recognised by the names of their classes, so that PEFT need not be installed."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_peft_model(model: nn.Module) -> bool:
    """Whether this is what ``get_peft_model`` returns."""
    return _is_of_peft(model, "PeftModel") or _is_of_peft(model, "PeftMixedModel")


def holds_adapters(model: nn.Module) -> bool:
    """Whether adapters of PEFT's can be trained and saved through this model: a PeftModel, or a model of transformers
    that was given some (``add_adapter``, ``load_adapter``)."""
    return is_peft_model(model) or bool(getattr(model, "_hf_peft_config_loaded", False))


def plain_model(model: nn.Module) -> nn.Module:
    """The model whose module names PEFT's configuration and files use: what a PeftModel is around, or ``model``."""
    peft: Any = model
    return peft.get_base_model() if is_peft_model(model) else model


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether PEFT put this module around a layer, for LoRA or any other of its methods."""
    return _is_of_peft(module, "BaseTunerLayer")


def _is_of_peft(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.split(".")[0] == "peft" for cls in type(module).__mro__)
