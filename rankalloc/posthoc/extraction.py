"""What an extraction did, layer by layer, and what it had to leave out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPORT_NAME = "extraction.json"


@dataclass(frozen=True)
class ExtractedLayer:
    """One matrix: its ``rank``, the size of its change ‖Δ‖_F and ``relative`` to ‖W‖_F, the ``error`` ‖Δ − BA‖_F, and
    whether its decomposition was ``exact`` or randomised (see :mod:`rankalloc.posthoc.dense`)."""

    name: str
    d_in: int
    d_out: int
    rank: int
    change: float
    relative: float
    error: float
    exact: bool


@dataclass(frozen=True)
class Leftover:
    """A tensor that an adapter cannot carry, and by how much it changed: ‖Δ‖_F, and ``relative`` to ‖W‖_F (1 where W
    was zero)."""

    name: str
    shape: tuple[int, ...]
    change: float
    relative: float


@dataclass(frozen=True)
class Extraction:
    """What :func:`rankalloc.extract` did.

    Attributes:
        path: the adapter's folder; the same record lies in it as extraction.json.
        layers: in the order of the base.
        leftovers: changed tensors that the adapter leaves out, the largest relative change first.
        params: numbers in the factors.
        notes: what the user should know, one sentence each.
    """

    path: Path
    layers: list[ExtractedLayer]
    leftovers: list[Leftover]
    params: int
    notes: list[str]

    @property
    def error(self) -> float:
        """‖Δ − BA‖_F over all adapted layers, relative to ‖Δ‖_F."""
        whole = sum(layer.change**2 for layer in self.layers)
        return (sum(layer.error**2 for layer in self.layers) / whole) ** 0.5 if whole else 0.0

    def ranks(self) -> dict[str, int]:
        """{module name: rank}."""
        return {layer.name: layer.rank for layer in self.layers}

    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "path": str(self.path), "error": self.error}


def summary(done: Extraction) -> str:
    """One line for people."""
    kept, layers = 1 - done.error**2, len(done.layers)
    line = f"{done.params:,} parameters hold {kept:.1%} of the change's energy in {layers} layers"
    if not done.leftovers:
        return line
    worst = done.leftovers[0]
    count = len(done.leftovers)
    return f"{line}; {count} changed tensors are left out, the largest {worst.name} by {worst.relative:.1%}"
