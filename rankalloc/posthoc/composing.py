"""Several adapters of one base as one adapter, within a budget.

A weighted sum of low-rank updates is exact as a low-rank update of the summed rank, Σ w P Λ Q = [P₁ P₂ …] diag(w Λ)
[Q₁; Q₂; …], and is then truncated like any other: the best adapter within the budget, negative weights (task
arithmetic, Ilharco et al., 2023, arXiv 2212.04089) included. ΔW is never formed.

Known weakness: the sum of what adapters do to the weights is not the sum of what they do; see
:mod:`rankalloc.posthoc.interference` for how far they are apart.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..budget import RankBudget
from ..errors import ConfigError
from ..lowrank import Factors, concatenate
from ..storage.folder import check_layout
from ..storage.reading import FinishedAdapter
from .combining import combiner, merged
from .compatible import check_same, common_heads
from .interference import meetings
from .results import CutResult
from .shrinking import settled
from .side_by_side import side_by_side
from .truncation import Choice, Progress, choose_from, cuts, spectra_of, write_choice

RECORD_NAME = "compose.json"


def compose(
    adapters: Sequence[str | os.PathLike | FinishedAdapter],
    weights: Sequence[float] | None = None,
    budget: RankBudget | None = None,
    out: str | os.PathLike | None = None,
    *,
    combination: str = "sum",
    density: float = 0.5,
    seed: int = 0,
    heads: str = "equal",
    missing: str = "error",
    same_base: bool = False,
    layout: str = "compact",
    pad_multiple: int = 1,
    progress: Progress | None = None,
) -> CutResult:
    """Write one adapter that does what several do, as far as the budget goes.

    Args:
        adapters: folders, or finished adapters.
        weights: one for each, of any sign; None for 1.
        budget: as in :func:`rankalloc.shrink`, ``fraction`` being of the summed ranks; None keeps every rank that
            the sum has, which is exact.
        out: folder to write, with ``compose.json``; None only to compute.
        combination: "sum", or PEFT's "ties", "dare_linear", "dare_ties" on whole updates with ``density`` and ``seed``.
        heads: of adapters that trained task heads: "equal" (they must be), "first", "average" (by plain mean), or
            "none" to leave them out.
        missing: what a layer counts as that one adapter has and another has not: "error", or "zero".
        same_base: the adapters name their base model differently, and it is the same.
        layout, pad_multiple, progress: as in :func:`rankalloc.shrink`.

    Returns:
        ``extra["interference"]`` has, for each layer and pair of adapters, principal angles, overlap and alignment.

    Raises:
        AdapterFileError: unlike bases, layers, shapes or heads; a damaged folder; weights that are not finite.
        ConfigError: an argument does not fit.
        BudgetError: the budget cannot be met.
        RankallocError: ``out`` cannot be written; nothing is changed then.

    Example:
        >>> import copy, tempfile, torch, rankalloc as ra
        >>> base, folders = torch.nn.Sequential(torch.nn.Linear(8, 8)), []
        >>> for _ in range(2):
        ...     adapters = ra.attach(copy.deepcopy(base), rank=2, init="lora")
        ...     folders.append(ra.save(adapters, tempfile.mkdtemp()))
        >>> ra.compose(folders, weights=[1, -0.5], budget=ra.RankBudget(ranks=2)).ranks
        {'0': 2}
    """
    check_layout(layout, pad_multiple)
    finished = [settled(adapter, out) for adapter in adapters]
    weights = [1.0] * len(finished) if weights is None else [float(weight) for weight in weights]
    if not finished or len(weights) != len(finished) or not all(map(math.isfinite, weights)):
        raise ConfigError(f"compose needs one finite weight for each adapter: {len(finished)} adapters, {weights}")
    if not any(weights):
        raise ConfigError("all weights are 0, so there is nothing to compose")
    check_same(finished, missing, same_base)
    held = common_heads(finished, heads)
    source = Sum(finished, weights)
    if combination != "sum":
        source = Merged(source, combiner(combination, density), budget, seed)
    spectra = spectra_of(source, None, progress)
    choice = choose_from(source, spectra, budget or RankBudget(ranks=sum(s.rank for s in spectra.values())))
    if budget is None:
        # no rank is spent on what is only rounding
        choice = replace(choice, ranks={name: spectrum.significant() for name, spectrum in spectra.items()})
    measured = {}
    if out is not None:
        measured = write_choice(
            source, choice, out, held, _config(finished, heads), layout, pad_multiple, finished[0].metadata
        )
    result = _result(source, choice, measured, finished, layout, pad_multiple, out)
    result.extra |= {
        "weights": weights, "combination": combination, "heads": heads, "interference": _interference(finished, source)
    }
    if out is not None:
        result.save(Path(out) / RECORD_NAME)
    return result


@dataclass(frozen=True)
class SummedLayer:
    d_in: int
    d_out: int
    dtype: torch.dtype
    ends: tuple[str, str]


class Sum:
    """A weighted sum of adapters, as one source of factors."""

    label = "the sum"

    def __init__(self, adapters: Sequence[FinishedAdapter], weights: Sequence[float]) -> None:
        self.adapters, self.weights = adapters, weights
        self.layers: dict[str, SummedLayer] = {}
        self.rest: dict[str, float] = {}
        for adapter in adapters:
            for name, layer in adapter.layers.items():
                have = self.layers.get(name)
                dtype = layer.dtype if have is None else torch.promote_types(have.dtype, layer.dtype)
                self.layers[name] = SummedLayer(layer.d_in, layer.d_out, dtype, layer.ends)

    def parts(self, name: str) -> list[tuple[int, Factors]]:
        """(position of the adapter, its factors), of those that have the layer."""
        return [(i, adapter.factors(name)) for i, adapter in enumerate(self.adapters) if name in adapter.layers]

    def stored(self, name: str) -> Factors:
        return concatenate([(self.weights[i], part) for i, part in self.parts(name)])


class Merged:
    """The same combined entry by entry; its factors are held, since each takes an SVD of a whole matrix."""

    label = "the combination"

    def __init__(self, total: Sum, combine: Callable, budget: RankBudget | None, seed: int) -> None:
        self.layers, self.rest = total.layers, {}
        self._held: dict[str, Factors] = {}
        for number, name in enumerate(total.layers):
            positions, parts = zip(*total.parts(name), strict=True)
            most = sum(part.rank for part in parts)
            if budget is not None and budget.max_rank is not None:
                most = min(most, budget.max_rank)
            weights = [total.weights[i] for i in positions]
            self._held[name], self.rest[name] = merged(parts, weights, combine, most, seed + number)

    def stored(self, name: str) -> Factors:
        return self._held[name]


def _config(finished: Sequence[FinishedAdapter], heads: str) -> dict[str, Any]:
    config = dict(finished[0].config)
    if any(adapter.layers.keys() != finished[0].layers.keys() for adapter in finished):
        config.pop("target_modules", None)
    if heads == "none":
        # with a classification task_type, PEFT expects the head to be in the file
        config |= {"modules_to_save": None, "task_type": None}
    return config


def _result(
    source: Sum | Merged, choice: Choice, measured: dict[str, float], finished: Sequence[FinishedAdapter], layout: str,
    pad_multiple: int, out: str | os.PathLike | None,
) -> CutResult:
    layers = [
        replace(cut, norm=math.hypot(cut.norm, source.rest.get(cut.name, 0.0)),
                error=math.hypot(cut.error, source.rest.get(cut.name, 0.0)))
        for cut in cuts(source, choice, measured)
    ]
    ranks = [layer.rank for layer in layers]
    top = -(-max([1, *ranks]) // pad_multiple) * pad_multiple
    return CutResult(
        layers=layers, unit=choice.plan.unit, asked=choice.plan.target, spent=choice.plan.spent(ranks),
        gap=choice.gap, metric="frobenius", layout=layout,
        stored_params=sum(layer.params(top if layout == "uniform" else layer.rank) for layer in layers),
        path=None if out is None else Path(out), sources=[adapter.folder.name for adapter in finished],
    )


def _interference(finished: Sequence[FinishedAdapter], source: Sum | Merged) -> dict[str, list[dict[str, Any]]]:
    if len(finished) < 2:
        return {}

    def one(name: str) -> list[dict[str, Any]]:
        parts = [(i, adapter.factors(name)) for i, adapter in enumerate(finished) if name in adapter.layers]
        return [asdict(meeting) for meeting in meetings(parts)]

    with side_by_side(one, source.layers) as results:
        return {name: results(name) for name in source.layers}
