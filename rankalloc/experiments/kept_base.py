"""A base model that is loaded once and given out many times, each time as if it had been loaded anew.

What is given out is a copy of the module tree, so nothing a run leaves behind (hooks, settings, adapters) is in the
next one. Its frozen weights are the kept ones' own memory; only what a run trains whole (heads, modules to save,
buffers) is copied. Random numbers go on as after a real load, so that a run has the same bits.

A run that writes into a frozen weight all the same is noticed by torch's version counter, and the base is loaded anew.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..layers.targets import find_heads, named_heads
from .tasks.base import PreparedTask


class KeptBase:
    """``build_model`` of a task, called once for each state of torch's generator.

    Args:
        build: loads the model.
        modules_to_save: as for :func:`rankalloc.attach`.
    """

    def __init__(self, build: Any, modules_to_save: Sequence[str] | None) -> None:
        self._build, self._modules = build, modules_to_save
        self._model: Any = None
        self._before = self._after = torch.empty(0)
        self._versions: dict[int, int] = {}
        self.loads = 0

    def __call__(self) -> Any:
        before = torch.get_rng_state()
        if self._model is None or not torch.equal(before, self._before) or self._written():
            self._model = None  # before another one is loaded
            model = self._build()
            self.loads += 1
            if not _plain(model):
                return model  # quantised weights, or a device's: loaded each time
            self._model, self._before, self._after = model, before, torch.get_rng_state()
            self._versions = {id(p): p._version for p in model.parameters()}
        torch.set_rng_state(self._after)
        return self._copy()

    def _written(self) -> bool:
        return any(p._version != self._versions[id(p)] for p in self._model.parameters())

    def _copy(self) -> Any:
        model = self._model
        heads = find_heads(model) if self._modules is None else named_heads(model, self._modules)
        trained = {id(p) for name in heads for p in model.get_submodule(name).parameters()}
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            for p in model.parameters() if id(p) not in trained
        }
        return copy.deepcopy(model, memo)


def _plain(model: nn.Module) -> bool:
    return all(type(p) is nn.Parameter and p.device.type == "cpu" for p in model.parameters())


def with_kept_base(prepared: PreparedTask, modules_to_save: Sequence[str] | None) -> PreparedTask:
    """The same task, whose base is loaded once."""
    return dataclasses.replace(prepared, build_model=KeptBase(prepared.build_model, modules_to_save))
