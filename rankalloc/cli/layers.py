"""The adaptable layers of a model, which is built on the meta device from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..experiments.tasks.packages import reference_of
from ..layer_names import places
from ..layers.adaptable import shape_of
from ..layers.targets import ALL_LINEAR, find_heads, find_targets, unadapted
from ..storage.skeletons import build_skeleton


@dataclass(frozen=True)
class LayerGroup:
    """Layers with the same place in their block and the same shape. One rank costs ``params_per_rank`` parameters
    in one layer (d_in + d_out) and ``params_all`` in all of them."""

    suffix: str
    layers: int
    d_in: int
    d_out: int
    params_per_rank: int
    params_all: int


@dataclass(frozen=True)
class Adaptable:
    """The layers that "all-linear" adapts in a model, its heads with their parameters, and notes on what it cannot
    adapt."""

    architecture: str
    groups: list[LayerGroup]
    heads: dict[str, int]
    notes: list[str]


def adaptable(model: str, trust_remote_code: bool = False) -> Adaptable:
    """The adaptable layers of a model folder, a hub id or the named example model.

    Raises:
        ConfigError: there is no such model, or it cannot be built.
        TargetError: it has no layer that can be adapted.
    """
    skeleton = build_skeleton(reference_of(model), trust_remote_code)
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
