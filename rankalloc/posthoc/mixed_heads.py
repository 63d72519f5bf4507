"""The task heads of adapters that are mixed: one for all inputs, or each adapter's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import AdapterFileError
from ..layers.adaptable import kind_of
from ..storage.reading import FinishedAdapter
from .compatible import HEADS, common_heads

MIXED_HEADS = (*HEADS, "mixed")
Pair = tuple[torch.Tensor, torch.Tensor | None]


def heads_of(
    finished: Mapping[str, FinishedAdapter], modules: Mapping[str, nn.Module], how: str
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Pair]]:
    """({module: {name: tensor}} that all inputs share, {linear layer: (K, d_out, d_in) and (K, d_out) or None} to mix).

    A head is taken layer by layer. With "mixed", its linear layers are mixed, and whatever else was trained in it must
    be equal in all adapters.

    Args:
        modules: those of the model, by name.
        how: one of :data:`MIXED_HEADS`.

    Raises:
        AdapterFileError: heads differ where they must not, or are not all there.
    """
    adapters = list(finished.values())
    if how != "mixed":
        states: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in common_heads(adapters, how).items():
            if ".base_layer." not in name:  # PEFT's copy of an embedding that is adapted, not trained
                owner, _, key = name.rpartition(".")
                states.setdefault(owner, {})[key] = value if isinstance(value, torch.Tensor) else value[1]()
        return states, {}
    names = [name for name in adapters[0].heads if ".base_layer." not in name]
    for other in adapters[1:]:
        theirs = [name for name in other.heads if ".base_layer." not in name]
        if odd := sorted(set(names) ^ set(theirs)):
            has, lacks = (adapters[0], other) if odd[0] in names else (other, adapters[0])
            raise AdapterFileError(
                f"{has.folder} trained {odd[0]} whole and {lacks.folder} did not, so it cannot be mixed; pass "
                "heads='first' or heads='none'"
            )
    states, mixed = {}, {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
        keys = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == owner]
        values = {key: _stacked(adapters, f"{owner}.{key}") for key in keys}
        if kind_of(modules.get(owner, nn.Identity())) == "linear" and "weight" in values:
            mixed[owner] = values["weight"], values.get("bias")
            continue
        for key, value in values.items():
            if not all(torch.equal(value[0], one) for one in value[1:]):
                raise AdapterFileError(
                    f"{owner}.{key} differs from adapter to adapter and is not part of a linear layer, so it cannot be "
                    "mixed; pass heads='first' or heads='average'"
                )
        states[owner] = {key: value[0] for key, value in values.items()}
    return states, mixed


def _stacked(adapters: list[FinishedAdapter], name: str) -> torch.Tensor:
    values = [adapter.head(name) for adapter in adapters]
    for value, adapter in zip(values, adapters, strict=True):
        if value.shape != values[0].shape:
            raise AdapterFileError(
                f"{name} is {tuple(values[0].shape)} in {adapters[0].folder} and {tuple(value.shape)} in "
                f"{adapter.folder}, which cannot be mixed: they have other labels"
            )
    return torch.stack(values)
