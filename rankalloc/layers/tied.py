"""Weights that several modules share, as an output head shares that of the embedding."""

from __future__ import annotations

from torch import nn


def partners(model: nn.Module, name: str) -> list[str]:
    """Full names of the other modules that hold a parameter of module ``name``, or of a part of it, as their own."""
    inside = model.get_submodule(name)
    shared = {id(parameter) for parameter in inside.parameters()}
    own = {id(module) for module in inside.modules()}
    return [
        other for other, module in model.named_modules(remove_duplicate=False)
        if id(module) not in own and any(id(p) in shared for p in module.parameters(recurse=False))
    ]


def untie(module: nn.Module) -> None:
    """Give a module and its parts parameters of their own, with the same values."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                part.register_parameter(name, copied)
