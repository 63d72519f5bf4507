"""The results of shrinking, composing and extracting: layer by layer and in all, for people and as JSON."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..budget import BudgetPlan
from ..files import write_json
from ..storage.folder import Stored

EXTRACTION_NAME = "extraction.json"


@dataclass(frozen=True)
class LayerCut:
    """One layer before and after a cut: its ranks, ‖ΔW‖_F (``norm``) and ‖ΔW − ΔW'‖_F (``error``), and both again in
    the metric that the ranks were chosen in."""

    name: str
    d_in: int
    d_out: int
    rank_before: int
    rank: int
    norm: float
    error: float
    metric_norm: float
    metric_error: float

    @property
    def relative_error(self) -> float:
        """‖ΔW − ΔW'‖_F / ‖ΔW‖_F; 0 for an update of zero."""
        return self.error / self.norm if self.norm else 0.0

    def params(self, rank: int) -> int:
        """Parameters of this layer at ``rank``."""
        return rank * (self.d_in + self.d_out)


@dataclass
class CutResult:
    """The result of :func:`rankalloc.shrink` or :func:`rankalloc.compose`.

    Attributes:
        layers: each layer before and after.
        unit, asked, spent: the budget and how much of it is used; ``spent`` is never above ``asked``.
        gap: the most by which another choice could lower the squared error, as a share of ‖ΔW‖².
        metric: "frobenius", or the name of the metric that weighed the layers.
        stored: what the adapter's tensors in the written folder hold, zero padding included.
        path: the written folder; None when nothing was written.
        sources: names of the folders that were read.
        extra: further entries of the JSON record.
    """

    layers: list[LayerCut]
    unit: str
    asked: int
    spent: int
    gap: float
    metric: str
    stored: Stored
    path: Path | None
    sources: list[str]
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, layers: list[LayerCut], plan: BudgetPlan | None, stored: Stored, out: str | os.PathLike | None,
        sources: list[str], *, gap: float = 0.0, metric: str = "frobenius", extra: dict[str, Any] | None = None,
    ) -> CutResult:
        """The result for these layers; None for ``plan`` when no budget was given, None for ``out`` when nothing was
        written."""
        ranks = [layer.rank for layer in layers]
        spent = sum(ranks) if plan is None else plan.spent(ranks)
        return cls(
            layers=layers, unit="ranks" if plan is None else plan.unit, asked=spent if plan is None else plan.target,
            spent=spent, gap=gap, metric=metric, stored=stored,
            path=None if out is None else Path(out), sources=sources, extra=extra or {},
        )

    @property
    def layout(self) -> str:
        """Of the written folder."""
        return self.stored.layout

    @property
    def stored_params(self) -> int:
        """Adapter weights in the written folder, zero padding included."""
        return self.stored.numbers

    @property
    def ranks(self) -> dict[str, int]:
        """{layer: rank kept}."""
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def error(self) -> float:
        """‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all layers together."""
        return _ratio(math.hypot(*(c.error for c in self.layers)), math.hypot(*(c.norm for c in self.layers)))

    @property
    def metric_error(self) -> float:
        """The relative error over all layers in the metric that the ranks were chosen in."""
        one, two = (math.hypot(*(getattr(c, key) for c in self.layers)) for key in ("metric_error", "metric_norm"))
        return _ratio(one, two)

    @property
    def errors(self) -> dict[str, float]:
        """{layer: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F}."""
        return {layer.name: layer.relative_error for layer in self.layers}

    @property
    def params_before(self) -> int:
        """Parameters before the cut, d_in + d_out for each rank, without zero padding."""
        return sum(layer.params(layer.rank_before) for layer in self.layers)

    @property
    def params(self) -> int:
        """Parameters of the kept ranks, d_in + d_out for each, without zero padding."""
        return sum(layer.params(layer.rank) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values for JSON."""
        return {
            "version": 1, "sources": self.sources, "metric": self.metric,
            "budget": {"unit": self.unit, "asked": self.asked, "spent": self.spent},
            "params": {"before": self.params_before, "after": self.params, "stored": self.stored_params},
            "ranks": {"before": sum(c.rank_before for c in self.layers), "after": sum(c.rank for c in self.layers)},
            "error": self.error, "metric_error": self.metric_error, "gap": self.gap, "layout": self.layout,
            "stored": asdict(self.stored),
            "layers": [{**asdict(layer), "relative_error": layer.relative_error} for layer in self.layers],
            **self.extra,
        }

    def save(self, path: str | os.PathLike) -> Path:
        """Write the record as JSON. Raises RankallocError when the file cannot be written."""
        return write_json(path, self.to_dict())

    def __str__(self) -> str:
        share = self.params / self.params_before if self.params_before else 1.0
        lines = [
            f"{self.params:,} of {self.params_before:,} parameters ({share:.1%}), "
            f"{sum(self.ranks.values()):,} ranks on {len(self.layers)} layers, relative error {self.error:.4g}"
        ]
        if self.metric != "frobenius":
            lines.append(f"relative error weighed by {self.metric}: {self.metric_error:.4g}")
        if self.path is not None and self.stored.padding:
            whom = self.stored.reader or f"layout {self.layout}"
            more = f"{self.stored.padding_bytes:,} bytes more"
            lines.append(f"padded for {whom}, the file holds {self.stored_params:,} numbers, {more}")
        width = max(len(layer.name) for layer in self.layers)
        lines += [f"{c.name:{width}}  {c.rank_before:>4} → {c.rank:<4} {c.relative_error:.4f}" for c in self.layers]
        return "\n".join(lines)


@dataclass(frozen=True)
class ExtractedLayer:
    """One matrix of an extraction.

    Attributes:
        rank: of its adapter.
        change: ‖Δ‖_F.
        relative: ‖Δ‖_F / ‖W‖_F.
        error: ‖Δ − BA‖_F.
        exact: whether it was decomposed exactly, not by random projections (:mod:`rankalloc.posthoc.dense`).
    """

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
    """A changed tensor that an adapter cannot hold: ‖Δ‖_F, and ``relative`` to ‖W‖_F (1 where W is zero)."""

    name: str
    shape: tuple[int, ...]
    change: float
    relative: float


@dataclass(frozen=True)
class Extraction:
    """The result of :func:`rankalloc.extract`.

    Attributes:
        path: the adapter's folder, which also holds this record as extraction.json.
        layers: the adapted matrices, in the order of the base.
        leftovers: changed tensors that the adapter leaves out, the largest relative change first.
        params: numbers in the factors.
        stored: what their tensors in the folder hold, zero padding included.
        notes: what the user should know, one sentence each.
    """

    path: Path
    layers: list[ExtractedLayer]
    leftovers: list[Leftover]
    params: int
    stored: Stored
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
        """The record as plain values for JSON."""
        return {**asdict(self), "path": str(self.path), "error": self.error}

    def __str__(self) -> str:
        kept = 1 - self.error**2
        line = f"{self.params:,} parameters hold {kept:.1%} of the change's energy in {len(self.layers)} layers"
        if self.stored.padding:
            line += f"; padded for {self.stored.reader or 'layout ' + self.stored.layout}, the file holds "
            line += f"{self.stored.numbers:,} numbers, {self.stored.padding_bytes:,} bytes more"
        if not self.leftovers:
            return line
        worst, count = self.leftovers[0], len(self.leftovers)
        return f"{line}; {count} changed tensors are left out, the largest {worst.name} by {worst.relative:.1%}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
