"""Cutting a nested adapter from the end: the first b triplets of every layer, at the scale they were trained at.

A DyLoRA run (Valipour et al., EACL 2023, arXiv 2210.07558; :mod:`rankalloc.methods.rules.dylora`) trains, for every b,

    ΔW_b = (α / b^e) · P[:, :b] Q[:b]          (e = 1, or ½ with scale="rslora")

as a separate adapter. A file of rank r holds ΔW_r, whose factor α / r^e is in lora_B, so a cut to b multiplies lora_B
by (r / b)^e. After a run of method "matryoshka" (:mod:`rankalloc.methods.rules.matryoshka`) the first b triplets are
used as they are, e = 0. All layers get the same b, as in training; a layer of a lower rank keeps all it has. The file's
metadata marks it as nested, which other readers ignore; operations that reorder or mix triplets drop the mark.

Cost: one pass over the file per cut, no decomposition of what is written. Known weakness: there are only as many points
as ranks, and no choice between layers. The largest singular triplets of the same file (``cut="svd"``) were not trained
to work alone, but can take more from one layer than from another, and can be the better adapter at equal parameters.
Where it matters, evaluate both (in one folder, so that the whole adapter is evaluated once).
"""

from __future__ import annotations

import os

import torch

from ..budget import BudgetPlan, RankBudget
from ..errors import AdapterFileError, BudgetError, ConfigError, unknown
from ..lowrank import Factors, distance, singular_values
from ..storage.folder import NESTED_KEY, LayerToWrite, stored_size, write_folder
from ..storage.layout import Layout
from ..storage.reading import FinishedAdapter
from .results import CutResult, LayerCut
from .truncation import config_of, passed_on, plan_over

CUTS = ("svd", "nested")
"""Keep the largest singular triplets, or the first triplets."""


def is_nested(adapter: FinishedAdapter) -> bool:
    """Whether the file is marked as nested."""
    return NESTED_KEY in adapter.metadata


def _exponent(adapter: FinishedAdapter) -> float:
    """e of the scale that the file was trained with."""
    exponent = adapter.nested_exponent
    if exponent is None:
        raise AdapterFileError(
            f"{adapter.label} is nested with a scale that this version does not know "
            f"({adapter.metadata.get(NESTED_KEY)!r}); use cut='svd'"
        )
    return exponent


def cut_of(adapter: FinishedAdapter, cut: str | None) -> str:
    """The kind of cut for ``adapter``: ``cut``, or for None the one that it was trained for.

    Raises:
        ConfigError: there is no such cut, or the adapter is not nested.
    """
    if cut is None:
        return "nested" if is_nested(adapter) else "svd"
    if cut not in CUTS:
        raise ConfigError(unknown("cut", cut, CUTS))
    if cut == "nested" and not is_nested(adapter):
        raise ConfigError(
            f"{adapter.label} is not known to be nested, so its first triplets are not an adapter: only what rankalloc "
            "saved from a run with method='dylora' or 'matryoshka' is nested; use cut='svd'"
        )
    return cut


def require_no_metric(cut: str, metric: object) -> None:
    """Raise ConfigError when a metric is given for a nested cut."""
    if cut == "nested" and metric is not None:
        raise ConfigError(
            "a nested cut takes the same rank of every layer, so there is nothing to calibrate for; leave out the "
            "metric, or use cut='svd'"
        )


def ranks_of(adapter: FinishedAdapter) -> dict[str, int]:
    """{layer: rank without zero padding}. Raises AdapterFileError when a weight is not finite."""
    return {name: adapter.factors(name).rank for name in adapter.layers}


def rank_within(adapter: FinishedAdapter, whole: dict[str, int], budget: RankBudget) -> tuple[int, BudgetPlan]:
    """The highest b whose cut meets ``budget``, and the resolved budget; ``whole`` is {layer: its full rank}.

    Raises:
        BudgetError: no b meets the budget.
    """
    _, plan = plan_over(adapter, whole, budget)
    top = max(whole.values(), default=0)
    for b in range(min(top, budget.max_rank or top), max(1, budget.min_rank) - 1, -1):
        ranks = [min(b, rank) for rank in whole.values()]
        if plan.spent(ranks) <= plan.target and not any(rank % budget.multiple_of for rank in ranks):
            return b, plan
    raise BudgetError(
        f"the budget of {plan.target:,} {plan.unit} has room for no nested cut: rank 1 in every layer costs "
        f"{plan.spent([min(1, rank) for rank in whole.values()]):,} (with min_rank={budget.min_rank}, multiple_of="
        f"{budget.multiple_of}); raise it, or use cut='svd'"
    )


def cut_nested(
    adapter: FinishedAdapter,
    rank: int,
    out: str | os.PathLike | None,
    layout: Layout,
    plan: BudgetPlan | None = None,
) -> CutResult:
    """Write the first ``rank`` triplets of every layer, which are a nested adapter again.

    None for ``out`` writes nothing; ``plan`` is the budget that ``rank`` meets, if there is one.
    """
    exponent = _exponent(adapter)
    layers: dict[str, LayerToWrite] = {}
    cuts: list[LayerCut] = []
    for name, layer in adapter.layers.items():
        whole = adapter.factors(name)
        kept = min(rank, whole.rank)
        layers[name] = LayerToWrite(layer.d_in, layer.d_out, kept, layer.dtype, layer.ends)
        norm = float(singular_values(whole).norm()) if whole.rank else 0.0
        error = distance(whole, *_leading(whole, rank, exponent, layer.dtype)) if whole.rank else 0.0
        error = 0.0 if kept == whole.rank else error
        cuts.append(LayerCut(name, layer.d_in, layer.d_out, whole.rank, kept, norm, error, norm, error))
    if out is not None:
        write_folder(
            out, layers,
            lambda name: _leading(adapter.factors(name), rank, exponent, adapter.layers[name].dtype),
            adapter.head_sources(), lambda names, top: config_of(adapter.config, names, top, layers), layout,
            passed_on(adapter.metadata, nested=True),
        )
    stored = stored_size(layers, layout, adapter.metadata)
    return CutResult.of(cuts, plan, stored, out, [adapter.folder.name], extra={"cut": "nested"})


def _leading(
    whole: Factors, rank: int, exponent: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A, lora_B) of the first triplets, scaled by (r / b)^e."""
    kept = min(rank, whole.rank)
    scale = whole.diagonal()[:kept] * (whole.rank / max(1, kept)) ** exponent
    return whole.Q[:kept].to(dtype), (whole.P[:, :kept] * scale).to(dtype)
