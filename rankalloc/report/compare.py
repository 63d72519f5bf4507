"""Two results side by side, as plain data: where their ranks differ, how far they agree, what else differs.

Every difference is the first minus the second. Layers are matched by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from . import grids
from .side import Side, SideLayer

ABSENT_KEY = "not set"
BOOKKEEPING = re.compile(r"(name|output|tracking|training\.(log|save)_every|audit(\..*)?|sweep(\..*)?)$")
"""Settings that change nothing of what is trained."""


@dataclass(frozen=True)
class Paired:
    """The mean difference of the losses of the same examples, with the 95 % interval of a paired t test; nothing but
    the examples is random in it."""

    split: str
    difference: float
    low: float
    high: float
    examples: int


@dataclass(frozen=True)
class LayerPair:
    """A layer in both, or in one of them; a rank is None where the layer is not adapted."""

    name: str
    block: int | None
    role: str
    one: int | None
    other: int | None

    @property
    def change(self) -> int | None:
        """First minus second; None where either is missing."""
        return None if self.one is None or self.other is None else self.one - self.other


@dataclass(frozen=True)
class Comparison:
    """``one`` beside ``other``."""

    one: Side
    other: Side

    @cached_property
    def names(self) -> tuple[str, str]:
        """What the two are called: by their names, by their folders where these are the same, else numbered."""
        one, other = self.one.name, self.other.name
        if one == other and self.one.place != self.other.place:
            one, other = self.one.place, self.other.place
        return (one, other) if one != other else (f"{one} (1)", f"{other} (2)")

    @cached_property
    def layers(self) -> list[LayerPair]:
        """Every layer of either, in the order of the first, then the second's own."""
        there = {layer.name: layer for layer in self.other.layers}
        rows = [_pair(layer, layer.rank, there.pop(layer.name, None)) for layer in self.one.layers]
        return rows + [LayerPair(x.name, x.block, x.role, None, x.rank) for x in there.values()]

    @cached_property
    def common(self) -> list[tuple[int, int]]:
        """(first's rank, second's) of the layers that both have."""
        return [(row.one, row.other) for row in self.layers if row.one is not None and row.other is not None]

    @cached_property
    def grid(self) -> grids.RankMap:
        """The differences by role and block; a layer that only one has is no cell."""
        return grids.grid(grids.groups(self.layers), [row.change for row in self.layers])

    @cached_property
    def correlation(self) -> float | None:
        """Spearman's rank correlation over the common layers; None where one side's ranks are all the same."""
        from scipy.stats import spearmanr

        if len(self.common) < 3 or any(len({pair[k] for pair in self.common}) < 2 for k in (0, 1)):
            return None
        return float(spearmanr(*zip(*self.common, strict=True)).statistic)

    @cached_property
    def layer_overlap(self) -> float | None:
        """Jaccard: layers that kept a rank in both, of those that did in either; None where none did."""
        kept = [(bool(row.one), bool(row.other)) for row in self.layers]
        return _share(sum(a and b for a, b in kept), sum(a or b for a, b in kept))

    @cached_property
    def rank_overlap(self) -> float | None:
        """Jaccard of the rank units, the k-th rank of a layer being one: Σ min / Σ max."""
        pairs = [(row.one or 0, row.other or 0) for row in self.layers]
        return _share(sum(map(min, pairs)), sum(map(max, pairs)))

    @cached_property
    def settings(self) -> list[tuple[str, str, str]]:
        """(dotted key, first's value, second's) of the settings that differ, :data:`BOOKKEEPING` aside."""
        one, other = (dict(_flat(side.config)) for side in (self.one, self.other))
        return [
            (key, one.get(key, ABSENT_KEY), other.get(key, ABSENT_KEY))
            for key in dict.fromkeys([*one, *other])
            if one.get(key) != other.get(key) and not BOOKKEEPING.match(key)
        ]  # fmt: skip

    @cached_property
    def quality(self) -> list[tuple[str, str, float | None, float | None]]:
        """(split, metric, first's value, second's), for each that either has."""
        splits = dict.fromkeys([*self.one.quality, *self.other.quality])
        rows = []
        for split in splits:
            one, other = (side.quality.get(split, {}) for side in (self.one, self.other))
            rows += [(split, name, one.get(name), other.get(name)) for name in dict.fromkeys([*one, *other])]
        return rows

    @cached_property
    def rank_cost(self) -> int:
        """Parameters of one rank of the costliest layer: sizes that differ by no more count as equal."""
        return max((layer.cost for side in (self.one, self.other) for layer in side.layers), default=0)

    @property
    def equal_size(self) -> bool:
        """Whether the two differ by at most one rank's cost."""
        return abs(self.one.params - self.other.params) <= self.rank_cost

    @cached_property
    def paired(self) -> Paired | None:
        """The losses of the same examples on the report split, else on the tuning split; None without both."""
        from scipy.stats import ttest_rel

        if self.one.fingerprint is None or self.one.fingerprint != self.other.fingerprint:
            return None
        for split in ("report", "tune"):
            one, other = self.one.losses.get(split, []), self.other.losses.get(split, [])
            if len(one) == len(other) > 1:
                mean = math.fsum(a - b for a, b in zip(one, other, strict=True)) / len(one)
                if len({a - b for a, b in zip(one, other, strict=True)}) == 1:  # the interval is that number
                    return Paired(split, mean, mean, mean, len(one))
                between = ttest_rel(one, other).confidence_interval(0.95)
                return Paired(split, mean, float(between.low), float(between.high), len(one))
        return None


def _pair(layer: SideLayer, rank: int, other: SideLayer | None) -> LayerPair:
    return LayerPair(layer.name, layer.block, layer.role, rank, None if other is None else other.rank)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys with their values as text."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", "null" if value is None else str(value)
