"""PEFT's models and layers, recognised by the names of their classes, so that PEFT need not be installed."""

from __future__ import annotations

from torch import nn


def is_peft_model(model: nn.Module) -> bool:
    """Whether this is what ``get_peft_model`` returns."""
    return _is_of_peft(model, "PeftModel") or _is_of_peft(model, "PeftMixedModel")


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether PEFT put this module around a layer, for LoRA or any other of its methods."""
    return _is_of_peft(module, "BaseTunerLayer")


def _is_of_peft(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name and cls.__module__.split(".")[0] == "peft" for cls in type(module).__mro__)
