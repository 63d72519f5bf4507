"""Loading bottleneck adapters into a model: what :func:`rankalloc.load` does with a folder of theirs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from ..adapters.adapter_set import Adapters
from ..adapters.bottleneck import BottleneckAdapter
from ..adapters.triplets import BOTTLENECK
from ..errors import AdapterFileError
from ..layers.adaptable import kind_of, shape_of
from ..layers.kinds import LINEAR
from . import fingerprint
from .bottleneck_folder import BOTTLENECK_WEIGHTS, read_bottlenecks
from .folder import BOTTLENECK_NAME, CONFIG_NAME
from .heads import check_head
from .model_saving import attach


def bottlenecks_in(path: str | os.PathLike) -> Path | None:
    """The folder with bottlenecks that ``path`` names: itself, or the ``adapter`` folder of a run; None for neither."""
    folder = Path(path)
    places = (folder, folder / "adapter")
    return next((p for p in places if (p / BOTTLENECK_NAME).exists() and not (folder / CONFIG_NAME).exists()), None)


def load_bottlenecks(model: nn.Module, folder: Path, check_base: bool = True) -> Adapters:
    """Attach the bottlenecks in ``folder`` to ``model``, which carries no adapters.

    Raises:
        AdapterFileError: a file is missing or damaged, or was made for another model; the model is unchanged then.
    """
    stored, tensors = read_bottlenecks(folder)
    modules = dict(model.named_modules())
    for name, bottleneck in stored.items():
        base = modules.get(name)
        if base is None or kind_of(base) not in LINEAR:
            raise AdapterFileError(
                f"{folder} was made for another model: {name} is "
                + ("not a layer of this one" if base is None else f"a {type(base).__name__} here")
            )
        if shape_of(base)[1] != len(bottleneck.b_up):
            raise AdapterFileError(
                f"{folder} was made for another model: {name} is {len(bottleneck.b_up)} wide in the adapter and "
                f"{shape_of(base)[1]} here"
            )
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        owner, _, key = name.rpartition(".")
        if owner not in modules:
            raise AdapterFileError(
                f"{folder} was made for another model: it holds {name}, and this model has no {owner}"
            )
        states.setdefault(owner, {})[key] = value
    for owner, state in states.items():
        check_head(owner, state, modules[owner], folder)
    if check_base:
        fingerprint.check(model, folder / BOTTLENECK_WEIGHTS)
    top = max([1, *(bottleneck.units for bottleneck in stored.values())])
    adapters = attach(
        model, rank=top, alpha=top, init=BOTTLENECK, target_modules=lambda name, _: name in stored,
        ranks={name: bottleneck.units for name, bottleneck in stored.items()}, modules_to_save=sorted(states),
    )
    with torch.no_grad():
        for name, bottleneck in stored.items():
            adapter = adapters.modules[name]
            assert isinstance(adapter, BottleneckAdapter), "attached as bottlenecks"
            adapter.Q.copy_(bottleneck.down)
            adapter.P.copy_(bottleneck.up)
            adapter.b_down.copy_(bottleneck.b_down)
            adapter.b_up.copy_(bottleneck.b_up)
        for owner, state in states.items():
            modules[owner].load_state_dict(state)
    return adapters
