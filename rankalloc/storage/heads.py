"""Modules that were trained whole, and whether those in a file fit a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import AdapterFileError


def check_head(head: str, state: Mapping[str, torch.Tensor], module: nn.Module, label: object) -> None:
    """Raise AdapterFileError when ``state`` is not that of a module like this one.

    Args:
        label: of the file or the adapters, in the message.
    """
    own = module.state_dict()
    for key in [*own, *state]:
        shapes = [tuple(tensors[key].shape) if key in tensors else "missing" for tensors in (state, own)]
        if shapes[0] != shapes[1]:
            raise AdapterFileError(
                f"{label} was made for another model, perhaps with other labels: {head}.{key} is {shapes[0]} in the "
                f"adapter and {shapes[1]} here"
            )
