"""One side of a comparison: what a run, a sweep's best trial or a finished adapter has in common with the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..trace import RankChoice, RankTrace


@dataclass(frozen=True)
class SideLayer:
    """A layer, its final rank, and what one rank of it costs in parameters."""

    name: str
    block: int | None
    role: str
    rank: int
    cost: int


@dataclass(frozen=True)
class Side:
    """``what`` says what it is, for people. ``quality`` holds metrics by split, ``losses`` those of the examples, which
    may be paired with another side's where ``fingerprint`` says that the data are the same. ``trace`` is the run's, and
    ``command`` what trained it. ``seeds`` is how many the quality is a mean over, for records of several; ``place`` the
    end of the path that it was read from, where it is needed to tell it from the other."""

    name: str
    what: str
    layers: list[SideLayer]
    choice: RankChoice | None = None
    quality: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    losses: Mapping[str, list[float]] = field(default_factory=dict)
    fingerprint: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    trace: RankTrace | None = None
    command: str | None = None
    seeds: int | None = None
    place: str = ""

    @property
    def params(self) -> int:
        """Parameters of the final ranks, as plain LoRA."""
        return sum(layer.rank * layer.cost for layer in self.layers)
