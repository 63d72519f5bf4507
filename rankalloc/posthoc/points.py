"""The quality of one adapter at a budget: shrunk, evaluated once, and remembered.

The cache names a point by a hash of the adapter's files, the budget, the metric that weighed the layers, and the task,
so a result is never used for anything else.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..budget import RankBudget
from ..errors import RankallocError
from ..files import sha256_of, write_json
from ..storage.folder import CONFIG_NAME, WEIGHTS_NAME
from ..storage.layout import Layout
from ..storage.reading import FinishedAdapter
from .metric import KroneckerMetric
from .nested_cut import cut_nested, rank_within, ranks_of
from .results import CutResult
from .shrinking import write_shrunk
from .truncation import Choice, Progress, choose_from, spectra_of

POINTS_NAME = "points.json"

Evaluate = Callable[[Path], float]
"""Turns an adapter's folder into the number that judges it. Its ``fingerprint`` names the task in the cache."""

_WRITTEN = Layout()
"""Of the folders that are evaluated."""


@dataclass(frozen=True)
class Point:
    """One budget: the ``params`` and ``ranks`` that were kept, the relative ``error``, and the evaluated ``value``."""

    budget: dict[str, Any]
    params: int
    ranks: int
    error: float
    value: float
    cached: bool = False


class Remembered:
    """The evaluated points of one adapter, by budget.

    Args:
        evaluate: turns a folder into a finite number.
        cache: folder whose ``points.json`` keeps the results; None keeps them in memory.
        metric: weighs the layers.
        ranks: {layer: rank of the whole adapter}.
    """

    def __init__(
        self, adapter: FinishedAdapter, evaluate: Evaluate, cache: str | os.PathLike | None,
        metric: KroneckerMetric | None, ranks: Mapping[str, int],
    ) -> None:
        self.adapter, self.evaluate, self.ranks_before = adapter, evaluate, dict(ranks)
        self.params = sum(
            rank * (adapter.layers[name].d_in + adapter.layers[name].d_out) for name, rank in ranks.items()
        )
        self._path = None if cache is None else Path(cache) / POINTS_NAME
        self._known: dict[str, Any] = _read(self._path)
        self._about = sha256_of(
            *((self.adapter.folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)),
            "" if metric is None else metric.fingerprint(), str(getattr(evaluate, "fingerprint", "")),
        )

    def whole(self) -> Point:
        """The adapter as it is."""
        rank = sum(self.ranks_before.values())
        return self._point({}, lambda: (self.params, rank, 0.0, self.evaluate(self.adapter.folder)))

    def _written(self, write: Callable[[Path], CutResult]) -> tuple[int, int, float, float]:
        """(parameters, ranks, relative error, value) of an adapter that ``write`` writes."""
        with tempfile.TemporaryDirectory() as folder:
            result = write(Path(folder))
            return result.params, sum(result.ranks.values()), result.error, self.evaluate(Path(folder))

    def _point(self, budget: dict[str, Any], work: Callable[[], tuple[int, int, float, float]]) -> Point:
        # a fraction was one of the ranks in files of earlier days
        unit = {"unit": "params"} if "fraction" in budget else {}
        key = sha256_of(self._about, json.dumps({**budget, **unit}, sort_keys=True))
        if key in self._known:
            return Point(**{**self._known[key], "cached": True})
        params, ranks, error, value = work()
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            at = f"at budget {budget}" if budget else "for the whole adapter"
            raise RankallocError(f"the evaluation gave {value!r} {at}; it must give a finite number")
        point = Point(budget, params, ranks, error, float(value))
        self._known[key] = {k: v for k, v in asdict(point).items() if k != "cached"}
        if self._path is not None:
            write_json(self._path, self._known)
        return point


class Points(Remembered):
    """The curve of quality against budget of one adapter, evaluated point by point on request.

    Args:
        evaluate, cache: as in :class:`Remembered`.
        metric: as in :func:`rankalloc.shrink`.
        progress: called with (layers done, layers in all, newest values) while the adapter is read.
    """

    def __init__(
        self, adapter: str | os.PathLike | FinishedAdapter, evaluate: Evaluate, cache: str | os.PathLike | None = None,
        metric: KroneckerMetric | None = None, progress: Progress | None = None,
    ) -> None:
        adapter = adapter if isinstance(adapter, FinishedAdapter) else FinishedAdapter(adapter)
        self.metric, self.spectra = metric, spectra_of(adapter, metric, progress)
        super().__init__(adapter, evaluate, cache, metric, {name: s.rank for name, s in self.spectra.items()})

    def choice(self, budget: RankBudget) -> Choice:
        """The ranks that ``budget`` buys."""
        return choose_from(self.adapter, self.spectra, budget)

    def at(self, budget: RankBudget) -> Point:
        """The point of the adapter shrunk to ``budget``."""
        bounds = {key: getattr(budget, key) for key in ("min_rank", "max_rank", "multiple_of")}
        return self._point(
            {**budget.given, **bounds}, lambda: self._written(lambda folder: self.write(budget, folder, _WRITTEN))
        )

    def write(self, budget: RankBudget, out: str | os.PathLike | None, layout: Layout) -> CutResult:
        """Write the adapter shrunk to ``budget``; None for ``out`` writes nothing."""
        return write_shrunk(self.adapter, self.choice(budget), out, layout, self.metric)


class NestedPoints(Remembered):
    """The curve of a nested adapter, one point per rank."""

    def __init__(self, adapter: FinishedAdapter, evaluate: Evaluate, cache: str | os.PathLike | None = None) -> None:
        super().__init__(adapter, evaluate, cache, None, ranks_of(adapter))

    def ranks(self, budgets: Sequence[RankBudget] | None = None) -> list[int]:
        """The ranks below the full one that ``budgets`` have room for, rising; None for all ranks.

        Raises:
            BudgetError: a budget has room for none.
        """
        top = max(self.ranks_before.values(), default=0)
        if budgets is None:
            return list(range(1, top))
        found = {rank_within(self.adapter, self.ranks_before, budget)[0] for budget in budgets}
        return sorted(found - {top})

    def at_rank(self, rank: int) -> Point:
        """The point of the first ``rank`` triplets of every layer."""
        return self._point(
            {"nested_rank": rank},
            lambda: self._written(lambda folder: cut_nested(self.adapter, rank, folder, _WRITTEN)),
        )


def _read(path: Path | None) -> dict[str, Any]:
    try:
        return {} if path is None or not path.exists() else dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError):
        return {}  # it is only a cache: a damaged one is evaluated again
