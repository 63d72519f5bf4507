"""A finished adapter within an exact budget, without training: data-free, or weighed by the user's own data.

Source of the idea: PARA (arXiv 2604.27796), which truncates the SVD of trained updates at one global threshold. Here
the threshold is the one that meets a budget; what is best and how nearly, is in :mod:`rankalloc.posthoc.truncation`.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..budget import RankBudget
from ..storage.folder import check_destination, check_layout
from ..storage.reading import FinishedAdapter
from .metric import KroneckerMetric
from .nested_cut import cut_nested, held_ranks, rank_within, settled_cut, unweighed
from .results import CutResult
from .truncation import Choice, Progress, choose, cuts, write_choice

RECORD_NAME = "shrink.json"


def shrink(
    adapter: str | os.PathLike | FinishedAdapter,
    budget: RankBudget,
    out: str | os.PathLike | None = None,
    *,
    metric: KroneckerMetric | None = None,
    cut: str = "svd",
    layout: str = "compact",
    pad_multiple: int = 1,
    progress: Progress | None = None,
) -> CutResult:
    """Write the best adapter within ``budget`` that a finished one contains.

    Args:
        adapter: a folder with a PEFT LoRA, a PEFT AdaLoRA or rankalloc's own adapter; heads go along as they are.
        budget: ranks, params, bytes or fraction, with min_rank, max_rank and multiple_of; its schedule is not looked
            at. It counts what the adapter uses: d_in + d_out parameters for each rank kept.
        out: folder to write; None only to choose. ``shrink.json`` is written beside the adapter.
        metric: how layers are weighed, such as what :func:`rankalloc.calibrate` returns; None for ‖·‖_F.
        cut: "svd"; or "nested" for what method "dylora" trained: the first triplets of every layer, as many as the
            budget has room for.
        layout: "compact", whose file is as small as the budget says, or "uniform", padded with zeros to one rank, for
            servers that ignore rank_pattern; see :mod:`rankalloc.storage.folder`.
        pad_multiple: in the uniform layout, round that rank up to a multiple of this.
        progress: called with (layers done, layers in all, newest values).

    Raises:
        BudgetError: the budget is above what the adapter has, below its floor, or buys nothing.
        AdapterFileError: the folder is damaged, of another kind, or holds weights that are not finite.
        ConfigError: the layout or the cut does not exist, the adapter is not nested and is to be cut so, or ``out`` is
            the adapter's own folder.
        RankallocError: ``out`` cannot be written; nothing is changed then.

    Example:
        >>> import tempfile, torch, rankalloc as ra
        >>> adapters = ra.attach(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), rank=4)
        >>> folder = ra.save(adapters, tempfile.mkdtemp())
        >>> result = ra.shrink(folder, ra.RankBudget(ranks=3), out=tempfile.mkdtemp())
        >>> sum(result.ranks.values()), result.params, result.params_before
        (3, 48, 128)
    """
    check_layout(layout, pad_multiple)
    finished = settled(adapter, out)
    if settled_cut(finished, cut) == "nested":
        unweighed(cut, metric)
        rank, plan = rank_within(finished, held_ranks(finished), budget)
        result = cut_nested(finished, rank, out, layout, pad_multiple, plan)
        if out is not None:
            result.save(Path(out) / RECORD_NAME)
        return result
    return write_shrunk(finished, choose(finished, budget, metric, progress), out, layout, pad_multiple, metric)


def settled(adapter: str | os.PathLike | FinishedAdapter, out: str | os.PathLike | None) -> FinishedAdapter:
    """The adapter, when ``out`` is a folder that one can be written to; ConfigError when it is not."""
    finished = adapter if isinstance(adapter, FinishedAdapter) else FinishedAdapter(adapter)
    if out is not None:
        check_destination(out, finished.folder)
    return finished


def write_shrunk(
    finished: FinishedAdapter,
    choice: Choice,
    out: str | os.PathLike | None,
    layout: str = "compact",
    pad_multiple: int = 1,
    metric: KroneckerMetric | None = None,
) -> CutResult:
    """Write what was chosen of an adapter, and ``shrink.json`` beside it; None for ``out`` writes nothing."""
    measured: dict[str, float] = {}
    if out is not None:
        heads = {name: (finished.spec(name), lambda name=name: finished.head(name)) for name in finished.heads}
        measured = write_choice(
            finished, choice, out, heads, finished.config, layout, pad_multiple, finished.metadata
        )
    layers = cuts(finished, choice, measured)
    ranks = [layer.rank for layer in layers]
    top = -(-max([1, *ranks]) // pad_multiple) * pad_multiple
    result = CutResult(
        layers=layers, unit=choice.plan.unit, asked=choice.plan.target, spent=choice.plan.spent(ranks),
        gap=choice.gap, metric="frobenius" if metric is None else str(metric), layout=layout,
        stored_params=sum(layer.params(top if layout == "uniform" else layer.rank) for layer in layers),
        path=None if out is None else Path(out), sources=[finished.folder.name],
    )
    if out is not None:
        result.save(Path(out) / RECORD_NAME)
    return result
