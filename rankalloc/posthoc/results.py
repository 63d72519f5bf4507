"""What shrinking and composing say about themselves: per layer and in all, for people and as JSON."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_json


@dataclass(frozen=True)
class LayerCut:
    """One layer before and after: ranks, ‖ΔW‖_F (``norm``) and ‖ΔW − ΔW'‖_F (``error``), and the same two in the
    metric that the choice was made in."""

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
        return rank * (self.d_in + self.d_out)


@dataclass
class CutResult:
    """The result of :func:`rankalloc.shrink` or :func:`rankalloc.compose`.

    Attributes:
        layers: what became of each layer.
        unit, asked, spent: the budget and what of it is used; ``spent`` is never above ``asked``.
        gap: the most that another choice could lower the squared error by, as a share of ‖ΔW‖².
        metric: "frobenius", or what the layers were weighed by.
        layout: of the written folder.
        stored_params: adapter weights in the written folder, zero padding included.
        path: the written folder; None when nothing was written.
        sources: the folders it came from.
        extra: what else there is to tell, as JSON.
    """

    layers: list[LayerCut]
    unit: str
    asked: int
    spent: int
    gap: float
    metric: str
    layout: str
    stored_params: int
    path: Path | None
    sources: list[str]
    extra: dict[str, Any] = field(default_factory=dict)

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
        """The same in the metric of the choice."""
        one, two = (math.hypot(*(getattr(c, key) for c in self.layers)) for key in ("metric_error", "metric_norm"))
        return _ratio(one, two)

    @property
    def errors(self) -> dict[str, float]:
        """{layer: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F}."""
        return {layer.name: layer.relative_error for layer in self.layers}

    @property
    def params_before(self) -> int:
        return sum(layer.params(layer.rank_before) for layer in self.layers)

    @property
    def params(self) -> int:
        """Parameters of the kept ranks, d_in + d_out each, zero padding aside."""
        return sum(layer.params(layer.rank) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "version": 1, "sources": self.sources, "metric": self.metric,
            "budget": {"unit": self.unit, "asked": self.asked, "spent": self.spent},
            "params": {"before": self.params_before, "after": self.params, "stored": self.stored_params},
            "ranks": {"before": sum(c.rank_before for c in self.layers), "after": sum(c.rank for c in self.layers)},
            "error": self.error, "metric_error": self.metric_error, "gap": self.gap, "layout": self.layout,
            "layers": [{**asdict(layer), "relative_error": layer.relative_error} for layer in self.layers],
            **self.extra,
        }

    def save(self, path: str | os.PathLike) -> Path:
        """Write it as JSON. Raises RankallocError when the file cannot be written."""
        return write_json(path, self.to_dict())

    def __str__(self) -> str:
        share = self.params / self.params_before if self.params_before else 1.0
        lines = [
            f"{self.params:,} of {self.params_before:,} parameters ({share:.1%}), "
            f"{sum(self.ranks.values()):,} ranks on {len(self.layers)} layers, relative error {self.error:.4g}"
        ]
        if self.metric != "frobenius":
            lines.append(f"relative error weighed by {self.metric}: {self.metric_error:.4g}")
        if self.path is not None and self.stored_params != self.params:
            lines.append(f"padded to one rank, the file holds {self.stored_params:,} (layout {self.layout})")
        width = max(len(layer.name) for layer in self.layers)
        lines += [f"{c.name:{width}}  {c.rank_before:>4} → {c.rank:<4} {c.relative_error:.4f}" for c in self.layers]
        return "\n".join(lines)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
