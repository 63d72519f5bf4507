"""What becomes of a model's weights, which is built on the meta device from its configuration alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..errors import ConfigError, TargetError
from ..experiments.config import load_config
from ..experiments.tasks.packages import reference_of
from ..layer_names import places
from ..layers.adaptable import shape_of
from ..layers.coverage import Weight, coverage, weights_of
from ..layers.statistics import said_of_statistics, with_running_statistics
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
class FrozenGroup:
    """Weights with the same place in their block and the same shape that stay frozen, and why; ``numbers`` are those
    of all of them."""

    suffix: str
    weights: int
    shape: tuple[int, ...]
    numbers: int
    why: str


@dataclass(frozen=True)
class Adaptable:
    """What becomes of a model's weights by default: the layers that "all-linear" adapts, the heads that train whole
    with their parameters, what is left frozen, the share of linear weights that is adapted (0 to 1, None without any),
    and notes on what it cannot adapt."""

    architecture: str
    groups: list[LayerGroup]
    heads: dict[str, int]
    frozen: list[FrozenGroup]
    coverage: float | None
    notes: list[str]


def adaptable(model: str, trust_remote_code: bool = False) -> Adaptable:
    """What is adapted by default in a model folder, its config.json, a hub id, the named example model, or the model of
    a run's YAML file.

    Raises:
        ConfigError: there is no such model, or it cannot be built.
    """
    return fates(build_skeleton(reference_of(_model_of(model)), trust_remote_code))


def _model_of(given: str) -> str:
    path = Path(given)
    if path.suffix.lower() not in (".yaml", ".yml") or not path.is_file():
        return given
    name = load_config(path, []).model_settings.name
    if name is None:
        raise ConfigError(f"{given} names no model; give rankalloc ls targets the model itself")
    return name


def fates(model: nn.Module) -> Adaptable:
    """What is adapted by default in ``model``; a model in which nothing is has a note that says what could be."""
    heads = find_heads(model)
    notes = unadapted(model, ALL_LINEAR) + said_of_statistics(with_running_statistics(model, heads), saved=True)
    try:
        found = find_targets(model, ALL_LINEAR, heads=heads)
    except TargetError as error:
        found, notes = {}, [*notes, str(error)]
    weights = weights_of(model, found, heads)
    return Adaptable(
        architecture=type(model).__name__,
        groups=[
            LayerGroup(role, amount, d_in, d_out, d_in + d_out, amount * (d_in + d_out))
            for (role, d_in, d_out), amount in Counter(
                (role, *shape_of(module)) for module, (_, role) in zip(found.values(), places(list(found)), strict=True)
            ).items()
        ],
        heads={name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in heads},
        frozen=_frozen([weight for weight in weights if weight.fate == "frozen"]),
        coverage=coverage(weights),
        notes=notes,
    )


def _frozen(weights: list[Weight]) -> list[FrozenGroup]:
    roles = (role for _, role in places([weight.name for weight in weights]))
    groups = Counter((role, weight.shape, weight.why) for role, weight in zip(roles, weights, strict=True))
    return [
        FrozenGroup(role, amount, shape, amount * math.prod(shape), why)
        for (role, shape, why), amount in groups.items()
    ]
