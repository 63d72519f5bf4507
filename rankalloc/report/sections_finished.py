"""The sections of a page about a finished adapter: after a cut, or at several budgets. A check has its own page."""

from __future__ import annotations

from matplotlib.figure import Figure

from . import colours, figures_map, grids, svg
from .exhibit import Exhibit
from .exhibits import map_header
from .facts import Subject
from .finished import CutRecord, FrontierPoint, FrontierRecord, cut_side
from .kinds import Source
from .section import Section, Shown
from .wording import ABSENT, count, number, percent, plural, rank


def cut_sentence(record: CutRecord) -> str:
    """What the cut kept and lost."""
    before = sum(layer.rank_before * (layer.d_in + layer.d_out) for layer in record.layers)
    after = sum(layer.rank * (layer.d_in + layer.d_out) for layer in record.layers)
    share = f" ({percent(after / before)})" if before else ""
    return (
        f"{count(after)} of {count(before)} parameters were kept{share}, at a relative error of "
        f"{number(record.error, 3)} in the weights; this says nothing about quality."
    )


def frontier_sentence(record: FrontierRecord) -> str:
    """The whole adapter's quality, and the knee's."""
    whole = max(record.points, key=lambda point: point.params, default=None)
    if whole is None:
        return "No budget was evaluated."
    text = f"{record.metric} is {number(whole.value)} with {count(whole.params)} parameters"
    if record.knee is not None and record.knee.params != whole.params:
        text += f", and {number(record.knee.value)} at the knee, with {count(record.knee.params)}"
    return text + "; one evaluation each, so small differences may be chance."


def _cut(page: Subject) -> Shown | None:
    if "cut" not in page.parts:
        return None
    record = CutRecord.model_validate(page.parts["cut"])
    layers = cut_side(Source(None, parts=page.parts)).layers
    table = grids.grid(grids.groups(layers), [layer.rank for layer in layers])
    rows = [
        [role, *(ABSENT if c is None else str(c) for c in cells), rank(mean)]
        for role, cells, mean in zip(table.roles, table.cells, table.row_means, strict=True)
    ]
    shown = [Exhibit(
        "map", "Rank map", lambda: figures_map.rank_map_figure(table),
        "The rank each layer keeps, by its role and its block. Darker is higher (lighter in dark mode); a dashed cell "
        "is rank 0.", map_header(table), rows,
    )]  # fmt: skip
    return {
        "sentence": cut_sentence(record), "figures": shown if layers else [],
        "header": ["Layer", "Rank before", "Rank kept", "Relative error"],
        "rows": [[x.name, count(x.rank_before), count(x.rank), number(x.relative_error, 3)] for x in record.layers],
    }  # fmt: skip


def _frontier(page: Subject) -> Shown | None:
    if "frontier" not in page.parts:
        return None
    record = FrontierRecord.model_validate(page.parts["frontier"])
    points = sorted(record.points, key=lambda point: point.params)
    rows = [[count(p.params), count(p.ranks), number(p.value), number(p.error, 3)] for p in points]
    header = ["Parameters", "Ranks", record.metric, "Relative error"]
    better = "higher" if record.higher_is_better else "lower"
    shown = [Exhibit(
        "frontier", "Quality against size", lambda: _curve(points, record),
        f"{record.metric} ({better} is better) of the adapter cut to {plural(len(points), 'budget')}; the ring is the "
        "knee.", header, rows, names=0,
    )]  # fmt: skip
    return {
        "sentence": frontier_sentence(record), "figures": shown if points else [], "header": header, "rows": rows,
    }  # fmt: skip


def _curve(points: list[FrontierPoint], record: FrontierRecord) -> Figure:
    figure = svg.canvas(3.4)
    axes = figure.add_subplot()
    axes.plot([p.params for p in points], [p.value for p in points], "o-", color=colours.ADAPTIVE, markersize=4.5)
    if record.knee is not None:
        axes.plot([record.knee.params], [record.knee.value], "o", markersize=13, markerfacecolor="none",
                  markeredgecolor=colours.UNIFORM)
    axes.set(xlabel="adapter parameters", ylabel=record.metric)
    axes.margins(0.08, 0.12)
    svg.whole(axes.xaxis)
    axes.grid(axis="y")
    return figure


FINISHED_SECTIONS = (
    Section("cut", "After the cut", "finished.html.j2", _cut),
    Section("frontier", "Quality against size", "finished.html.j2", _frontier),
)
