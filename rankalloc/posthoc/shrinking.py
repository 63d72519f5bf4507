"""Shrinking a finished adapter to an exact budget without training: data-free, or weighed by the user's own data.

The idea is from PARA (arXiv 2604.27796), which truncates the SVD of trained updates at one global threshold. Here the
threshold follows from the budget; :mod:`rankalloc.posthoc.truncation` proves how close to the best the choice is.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..budget import RankBudget
from ..storage.folder import require_destination, stored_size
from ..storage.layout import Layout
from ..storage.readers import layout_for
from ..storage.reading import FinishedAdapter
from .metric import KroneckerMetric
from .nested_cut import cut_nested, cut_of, rank_within, ranks_of, require_no_metric
from .results import CutResult
from .truncation import Choice, Progress, choose, cuts, to_write, write_choice

RECORD_NAME = "shrink.json"


def shrink(
    adapter: str | os.PathLike | FinishedAdapter,
    budget: RankBudget,
    out: str | os.PathLike | None = None,
    *,
    metric: KroneckerMetric | None = None,
    cut: str = "svd",
    layout: str | None = None,
    pad_multiple: int = 1,
    reader: str | None = None,
    progress: Progress | None = None,
) -> CutResult:
    """Write the best adapter within ``budget`` that a finished one contains.

    Args:
        adapter: a folder with a PEFT LoRA, a PEFT AdaLoRA or rankalloc's own adapter; heads go along as they are.
        budget: ranks, params, bytes or fraction, with min_rank, max_rank and multiple_of; its schedule is ignored. It
            counts d_in + d_out parameters for each rank kept.
        out: folder to write; None only chooses. ``shrink.json`` is written beside the adapter.
        metric: weighs the layers, such as the result of :func:`rankalloc.calibrate`; None for ‖·‖_F.
        cut: "svd"; or "nested" for what method "dylora" or "matryoshka" trained: the first triplets of every layer, as
            many as the budget has room for.
        layout, pad_multiple, reader: as for :func:`rankalloc.save`; the default is as small as the budget says.
        progress: called with (layers done, layers in all, newest values).

    Raises:
        BudgetError: the budget is above what the adapter has, below its floor, or buys nothing.
        AdapterFileError: the folder is damaged, of a type that is not supported, or holds weights that are not finite.
        ConfigError: the layout or the cut does not exist, a nested cut is asked of an adapter that is not nested, or
            ``out`` is the adapter's own folder.
        RankallocError: ``out`` cannot be written; nothing is changed then.

    Example:
        >>> import tempfile, torch, rankalloc as ra
        >>> adapters = ra.attach(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), rank=4)
        >>> folder = ra.save(adapters, tempfile.mkdtemp())
        >>> result = ra.shrink(folder, ra.RankBudget(ranks=3), out=tempfile.mkdtemp())
        >>> sum(result.ranks.values()), result.params, result.params_before
        (3, 48, 128)
    """
    written = layout_for(layout, pad_multiple, reader)
    finished = open_adapter(adapter, out)
    if cut_of(finished, cut) == "nested":
        require_no_metric(cut, metric)
        rank, plan = rank_within(finished, ranks_of(finished), budget)
        result = cut_nested(finished, rank, out, written, plan)
        if out is not None:
            result.save(Path(out) / RECORD_NAME)
        return result
    return write_shrunk(finished, choose(finished, budget, metric, progress), out, written, metric)


def open_adapter(
    adapter: str | os.PathLike | FinishedAdapter, out: str | os.PathLike | None = None
) -> FinishedAdapter:
    """Open ``adapter``, unless it is open. Raises ConfigError when ``out`` is not a folder to write an adapter to."""
    finished = adapter if isinstance(adapter, FinishedAdapter) else FinishedAdapter(adapter)
    if out is not None:
        require_destination(out, finished.folder)
    return finished


def write_shrunk(
    finished: FinishedAdapter,
    choice: Choice,
    out: str | os.PathLike | None,
    layout: Layout,
    metric: KroneckerMetric | None = None,
) -> CutResult:
    """Write the chosen triplets of an adapter, and ``shrink.json`` beside them; None for ``out`` writes nothing."""
    measured: dict[str, float] = {}
    if out is not None:
        measured = write_choice(
            finished, choice, out, finished.head_sources(), finished.config, layout, finished.metadata
        )
    result = CutResult.of(
        cuts(finished, choice, measured), choice.plan,
        stored_size(to_write(finished, choice), layout, finished.metadata), out, [finished.folder.name],
        gap=choice.gap, metric="frobenius" if metric is None else str(metric),
    )
    if out is not None:
        result.save(Path(out) / RECORD_NAME)
    return result
