"""Cutting a nested adapter from the end: the first b triplets of every layer, at the scale they were trained at.

A DyLoRA run (Valipour et al., EACL 2023, arXiv 2210.07558; :mod:`rankalloc.methods.rules.dylora`) trains, for every b,

    ΔW_b = (α / b^e) · P[:, :b] Q[:b]          (e = 1, or ½ with scale="rslora")

as an adapter of its own. A file of rank r holds ΔW_r, whose factor α / r^e is in lora_B: cut to b, lora_B is multiplied
by (r / b)^e. One b for all layers, as in training; a layer of a lower rank keeps what it has. That a file is nested
stands in its metadata, which other readers skip; whatever reorders or mixes triplets does not pass it on.

Cost: one pass over the file a cut, no decomposition of what is written. Known weakness: as many points as ranks, and no
choice between layers. The largest singular triplets of the same file (``cut="svd"``) were not trained to stand alone,
but are free to take more of one layer than of another, and can be the better adapter at equal parameters: where it
matters, evaluate both (in one folder, so that the whole is evaluated once).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..adapters.adapter_set import SCALES
from ..budget import BudgetPlan, RankBudget
from ..errors import AdapterFileError, BudgetError, ConfigError, unknown
from ..lowrank import Factors, distance, singular_values
from ..storage.folder import NESTED_KEY, LayerToWrite, write_folder
from ..storage.reading import FinishedAdapter
from .results import CutResult, LayerCut
from .truncation import config_of, passed_on, plan_over

CUTS = ("svd", "nested")
"""By singular triplets, or from the end."""
_EXPONENTS = {f"{exponent:g}": exponent for exponent in SCALES.values()}


def is_nested(adapter: FinishedAdapter) -> bool:
    """Whether the file says that its first triplets are adapters too."""
    return NESTED_KEY in adapter.metadata


def _exponent(adapter: FinishedAdapter) -> float:
    """e of the scale that the file was trained with."""
    value = adapter.metadata[NESTED_KEY]
    if value not in _EXPONENTS:
        raise AdapterFileError(
            f"{adapter.label} says that it is nested with a scale that is unknown here ({value!r}); use cut='svd'"
        )
    return _EXPONENTS[value]


def settled_cut(adapter: FinishedAdapter, cut: str | None) -> str:
    """The cut that is meant; None is what the adapter was trained for.

    Raises:
        ConfigError: it is unknown, or the adapter is not nested.
    """
    if cut is None:
        return "nested" if is_nested(adapter) else "svd"
    if cut not in CUTS:
        raise ConfigError(unknown("cut", cut, CUTS))
    if cut == "nested" and not is_nested(adapter):
        raise ConfigError(
            f"{adapter.label} is not known to be nested, so its first triplets are no adapter: only what rankalloc "
            "saved of a run with method='dylora' is; use cut='svd'"
        )
    return cut


def unweighed(cut: str, metric: object) -> None:
    """Raise ConfigError when layers are to be weighed for a nested cut."""
    if cut == "nested" and metric is not None:
        raise ConfigError(
            "a nested cut takes the same rank of every layer, so there is nothing to calibrate for; leave that out, or "
            "use cut='svd'"
        )


def held_ranks(adapter: FinishedAdapter) -> dict[str, int]:
    """{layer: rank without padding}. Raises AdapterFileError when a weight is not finite."""
    return {name: adapter.factors(name).rank for name in adapter.layers}


def rank_within(adapter: FinishedAdapter, held: dict[str, int], budget: RankBudget) -> tuple[int, BudgetPlan]:
    """The highest b whose cut meets ``budget``, and the budget resolved.

    Raises:
        BudgetError: no b does.
    """
    _, plan = plan_over(adapter, held, budget)
    top = max(held.values(), default=0)
    for b in range(min(top, budget.max_rank or top), max(1, budget.min_rank) - 1, -1):
        ranks = [min(b, rank) for rank in held.values()]
        if plan.spent(ranks) <= plan.target and not any(rank % budget.multiple_of for rank in ranks):
            return b, plan
    raise BudgetError(
        f"the budget of {plan.target:,} {plan.unit} has room for no nested cut: rank 1 in every layer costs "
        f"{plan.spent([min(1, rank) for rank in held.values()]):,} (with min_rank={budget.min_rank}, multiple_of="
        f"{budget.multiple_of}); raise it, or use cut='svd'"
    )


def cut_nested(
    adapter: FinishedAdapter,
    rank: int,
    out: str | os.PathLike | None,
    layout: str = "compact",
    pad_multiple: int = 1,
    plan: BudgetPlan | None = None,
) -> CutResult:
    """Write the first ``rank`` triplets of every layer; None for ``out`` writes nothing. The folder is a nested
    adapter itself."""
    layers, cuts, exponent = {}, [], _exponent(adapter)
    for name, layer in adapter.layers.items():
        whole = adapter.factors(name)
        kept = min(rank, whole.rank)
        layers[name] = LayerToWrite(layer.d_in, layer.d_out, kept, layer.dtype, layer.ends)
        norm = float(singular_values(whole).norm()) if whole.rank else 0.0
        error = distance(whole, *_leading(whole, rank, exponent, layer.dtype)) if whole.rank else 0.0
        error = 0.0 if kept == whole.rank else error
        cuts.append(LayerCut(name, layer.d_in, layer.d_out, whole.rank, kept, norm, error, norm, error))
    ranks = [cut.rank for cut in cuts]
    if out is not None:
        heads = {name: (adapter.spec(name), lambda name=name: adapter.head(name)) for name in adapter.heads}
        write_folder(
            out, layers,
            lambda name: _leading(adapter.factors(name), rank, exponent, adapter.layers[name].dtype), heads,
            lambda names, top: config_of(adapter.config, names, top, layers), layout, pad_multiple,
            passed_on(adapter.metadata, nested=True),
        )
    top = -(-max([1, *ranks]) // pad_multiple) * pad_multiple
    spent = sum(ranks) if plan is None else plan.spent(ranks)
    return CutResult(
        layers=cuts, unit="ranks" if plan is None else plan.unit, asked=spent if plan is None else plan.target,
        spent=spent, gap=0.0, metric="frobenius", layout=layout,
        stored_params=sum(cut.params(top if layout == "uniform" else cut.rank) for cut in cuts),
        path=None if out is None else Path(out), sources=[adapter.folder.name], extra={"cut": "nested"},
    )


def _leading(
    whole: Factors, rank: int, exponent: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A, lora_B) of the first triplets, scaled by (r / b)^e."""
    kept = min(rank, whole.rank)
    scale = whole.diagonal()[:kept] * (whole.rank / max(1, kept)) ** exponent
    return whole.Q[:kept].to(dtype), (whole.P[:, :kept] * scale).to(dtype)
