"""Composing several adapters of one base into one adapter, within a budget.

A weighted sum of low-rank updates is exactly a low-rank update of the summed rank, Σ w P Λ Q = [P₁ P₂ …] diag(w Λ)
[Q₁; Q₂; …]. It is truncated like any other update: the result is the best adapter within the budget, also for negative
weights (task arithmetic, Ilharco et al., 2023, arXiv 2212.04089). ΔW is never formed.

Known weakness: adding updates of weights does not add their effects; :mod:`rankalloc.posthoc.interference` measures how
much two adapters overlap.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..budget import RankBudget
from ..errors import ConfigError
from ..lowrank import Factors, concatenate
from ..options import integer
from ..storage.folder import stored_size
from ..storage.peft_names import KEY
from ..storage.readers import layout_for
from ..storage.reading import FinishedAdapter
from .combining import Combine, combiner, merged
from .compatible import common_heads, require_composable
from .interference import interference_of
from .random_partner import RandomPartner
from .results import CutResult, LayerCut
from .shrinking import open_adapter
from .side_by_side import side_by_side
from .truncation import Progress, SourceLayer, choose_from, cuts, spectra_of, to_write, write_choice

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
    control: int | None = None,
    layout: str | None = None,
    pad_multiple: int = 1,
    reader: str | None = None,
    progress: Progress | None = None,
) -> CutResult:
    """Write one adapter that adds up several, as closely as the budget allows.

    Args:
        adapters: folders, or finished adapters.
        weights: one for each adapter, of any sign; None for 1.
        budget: as in :func:`rankalloc.shrink`, with ``fraction`` relative to the parameters of the summed ranks; None
            keeps every rank of the sum, which is exact.
        out: folder to write, with ``compose.json``; None only computes.
        combination: "sum", or PEFT's "ties", "dare_linear", "dare_ties" on whole updates with ``density`` and ``seed``.
        heads: which task heads to write: "equal" (all adapters must have the same), "first", "average" (the plain
            mean), or "none".
        missing: how to treat a layer that only some of the adapters have: "error", or "zero" for no change.
        same_base: the adapters have the same base model, although they name it differently.
        control: a seed puts a random adapter of equal ranks and sizes in the place of each but the first
            (:mod:`rankalloc.posthoc.random_partner`); the heads are those of the composition itself.
        layout, pad_multiple, reader, progress: as in :func:`rankalloc.shrink`.

    Returns:
        Its ``extra["interference"]`` has principal angles, overlap and alignment for each layer and pair of adapters.

    Raises:
        AdapterFileError: bases, layers, shapes or heads differ; a folder is damaged; weights are not finite.
        ConfigError: an argument does not fit, or a control is asked for of one adapter.
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
    written = layout_for(layout, pad_multiple, reader)
    finished = [open_adapter(adapter, out) for adapter in adapters]
    weights = [1.0] * len(finished) if weights is None else [float(weight) for weight in weights]
    if not finished or len(weights) != len(finished) or not all(map(math.isfinite, weights)):
        raise ConfigError(f"compose needs one finite weight for each adapter: {len(finished)} adapters, {weights}")
    if not any(weights):
        raise ConfigError("all weights are 0, so there is nothing to compose")
    require_composable(finished, missing, same_base)
    common = common_heads(finished, heads)
    parts: list[Part] = list(finished)
    if control is not None:
        control = integer("control", control, 0)
        parts[1:] = [RandomPartner(adapter, control + number) for number, adapter in enumerate(finished[1:])]
        if not parts[1:]:
            raise ConfigError("a control stands for the adapters after the first, and there is one adapter")
    total = Sum(parts, weights)
    source = total if combination == "sum" else Merged(total, combiner(combination, density), budget, seed)
    spectra = spectra_of(source, None, progress)
    choice = choose_from(source, spectra, budget or RankBudget(ranks=sum(s.rank for s in spectra.values())))
    if budget is None:
        # no rank is spent on what is only rounding
        choice = replace(choice, ranks={name: spectrum.significant() for name, spectrum in spectra.items()})
    measured: dict[str, float] = {}
    if out is not None:
        measured = write_choice(source, choice, out, common, _config(finished, heads), written, finished[0].metadata)
    layers = _with_rest(cuts(source, choice, measured), source.rest)
    result = CutResult.of(
        layers, choice.plan, stored_size(to_write(source, choice), written, finished[0].metadata), out,
        [adapter.folder.name for adapter in finished], gap=choice.gap,
    )
    result.extra |= {
        "weights": weights, "combination": combination, "heads": heads, "interference": _interference(parts, source)
    } | ({} if control is None else {"control": control})
    if out is not None:
        result.save(Path(out) / RECORD_NAME)
    return result


@dataclass(frozen=True)
class SummedLayer:
    """One layer of a sum; ``dtype`` is the widest of its parts."""

    d_in: int
    d_out: int
    dtype: torch.dtype
    ends: tuple[str, str]


class Part(Protocol):
    """One adapter of a sum, layer by layer."""

    @property
    def layers(self) -> Mapping[str, SourceLayer]:
        """{layer name: its shape}."""
        ...

    def factors(self, name: str) -> Factors:
        """The factors of one layer, without zero padding."""
        ...


class Sum:
    """A weighted sum of adapters, as one source of factors.

    Attributes:
        rest: {layer: ‖·‖_F of the part of its update that no factors hold}; a sum has none.
    """

    label = "the sum"

    def __init__(self, adapters: Sequence[Part], weights: Sequence[float]) -> None:
        self.adapters, self.weights = adapters, weights
        self.layers: dict[str, SummedLayer] = {}
        self.rest: dict[str, float] = {}
        for adapter in adapters:
            for name, layer in adapter.layers.items():
                have = self.layers.get(name)
                dtype = layer.dtype if have is None else torch.promote_types(have.dtype, layer.dtype)
                self.layers[name] = SummedLayer(layer.d_in, layer.d_out, dtype, layer.ends)

    def parts(self, name: str) -> list[tuple[int, Factors]]:
        """(position of the adapter, its factors) for each adapter that has the layer."""
        return [(i, adapter.factors(name)) for i, adapter in enumerate(self.adapters) if name in adapter.layers]

    def stored(self, name: str) -> Factors:
        """The factors of the summed update of one layer, exactly."""
        return concatenate([(self.weights[i], part) for i, part in self.parts(name)])


class Merged:
    """The parts of a sum combined entry by entry, as one source of factors.

    All factors stay in memory, since each layer takes the SVD of a whole matrix.
    """

    label = "the combination"

    def __init__(self, total: Sum, combine: Combine, budget: RankBudget | None, seed: int) -> None:
        self.layers = total.layers
        self.rest: dict[str, float] = {}
        self._factors: dict[str, Factors] = {}
        for number, name in enumerate(total.layers):
            positions, parts = zip(*total.parts(name), strict=True)
            most = sum(part.rank for part in parts)
            if budget is not None and budget.max_rank is not None:
                most = min(most, budget.max_rank)
            weights = [total.weights[i] for i in positions]
            self._factors[name], self.rest[name] = merged(parts, weights, combine, most, seed + number)

    def stored(self, name: str) -> Factors:
        """The factors of the combined update of one layer."""
        return self._factors[name]


def _config(finished: Sequence[FinishedAdapter], heads: str) -> dict[str, Any]:
    """The configuration of the first adapter, without the entries that do not hold for the composed one."""
    config = dict(finished[0].config)
    if any(adapter.layers.keys() != finished[0].layers.keys() for adapter in finished):
        config.pop("target_modules", None)
        config[KEY] = sorted({name for adapter in finished for name in adapter.config.get(KEY) or ()})
    if heads == "none":
        # with a classification task_type, PEFT expects the head to be in the file
        config |= {"modules_to_save": None, "task_type": None}
    return config


def _with_rest(layers: list[LayerCut], rest: Mapping[str, float]) -> list[LayerCut]:
    """``layers`` with the parts of their updates that no factors hold counted in norm and error."""
    return [
        replace(layer, norm=math.hypot(layer.norm, rest.get(layer.name, 0.0)),
                error=math.hypot(layer.error, rest.get(layer.name, 0.0)))
        for layer in layers
    ]


def _interference(finished: Sequence[Part], source: Sum | Merged) -> dict[str, list[dict[str, Any]]]:
    if len(finished) < 2:
        return {}

    def one(name: str) -> list[dict[str, Any]]:
        parts = [(i, adapter.factors(name)) for i, adapter in enumerate(finished) if name in adapter.layers]
        return [asdict(pair) for pair in interference_of(parts)]

    with side_by_side(one, source.layers) as results:
        return {name: results(name) for name in source.layers}
