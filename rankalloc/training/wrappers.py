"""Who wraps a model: DDP, DataParallel and averages hold it, and it does not know them.

torch keeps no such list, so each question is a search through memory; with transformers loaded it takes a fifth of a
second.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from ..errors import RankallocError
from ..layers.replicas import DATA_PARALLEL

_Wrapper = TypeVar("_Wrapper", bound=nn.Module)


def wrappers_of(parts: Sequence[nn.Module], kind: type[_Wrapper]) -> list[_Wrapper]:
    """The living modules of type ``kind`` around any of ``parts``, whoever made them."""
    inside = {id(part) for part in parts}
    # the type, and not isinstance, which asks every object in memory for its __class__
    found = [item for item in gc.get_objects() if issubclass(type(item), kind)]
    return [wrapper for wrapper in found if any(id(module) in inside for module in wrapper.modules())]


def refuse_data_parallel(model: nn.Module) -> None:
    """Raise RankallocError when nn.DataParallel spreads ``model``, or a part of it, over several devices.

    transformers' Trainer uses it whenever several GPUs are visible and no launcher is.
    """
    found = [module for module in model.modules() if isinstance(module, nn.DataParallel)]
    if torch.accelerator.device_count() > 1:  # searching memory takes a fifth of a second; one device needs no search
        found += wrappers_of([model], nn.DataParallel)
    if any(len(wrapper.device_ids) > 1 for wrapper in found):
        raise RankallocError(DATA_PARALLEL)
