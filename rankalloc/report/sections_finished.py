"""The sections of a page about a finished adapter: after a cut, or at several budgets. A check has its own page."""

from __future__ import annotations

from matplotlib.figure import Figure

from . import colours, figures_map, grids, svg
from .exhibit import Exhibit
from .exhibits import map_header
from .facts import Subject
from .finished import CutRecord, FrontierRecord, cut_side
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
    if record.recovered:
        text += f"; every cut was trained on for {plural(record.recovered, 'step')}"
    return text + "; one evaluation each, so small differences may be chance."


def frontiers_sentence(page: Subject) -> str:
    """:func:`frontier_sentence` of each frontier of the page."""
    return " ".join(f"{name}: {frontier_sentence(one)}" if name else frontier_sentence(one)
                    for name, one in frontiers(page))  # fmt: skip


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
    curves = frontiers(page)
    record = curves[0][1]
    header, rows = frontier_rows(page)
    better = "higher" if record.higher_is_better else "lower"
    budgets = " and ".join(count(len(one.points)) for _, one in curves[:-1]) + (" and " if len(curves) > 1 else "")
    budgets += plural(len(curves[-1][1].points), "budget")
    shown = [Exhibit(
        "frontier", "Quality against size", lambda: _curves(curves),
        f"{record.metric} ({better} is better) of {'each' if len(curves) > 1 else 'the'} adapter cut to {budgets}; the "
        "ring is the knee.", header, rows, names=len(curves) - 1,
    )]  # fmt: skip
    return {"sentence": frontiers_sentence(page), "figures": shown if rows else [], "header": header, "rows": rows}


def frontier_rows(page: Subject) -> tuple[list[str], list[list[str]]]:
    """The header and a row for each budget, by size; of two frontiers, with the name of the adapter before it."""
    curves = frontiers(page)
    points = [(p, name) for name, one in curves for p in one.points]
    rows = [
        [*([name] if len(curves) > 1 else []), count(p.params), count(p.ranks), number(p.value), number(p.error, 3)]
        for p, name in sorted(points, key=lambda one: one[0].params)
    ]
    metric = curves[0][1].metric
    return [*(["Adapter"] if len(curves) > 1 else []), "Parameters", "Ranks", metric, "Relative error"], rows


def frontiers(page: Subject) -> list[tuple[str, FrontierRecord]]:
    """(name, record) of the frontier of the page, or of the two that it compares; one alone needs no name."""
    own = FrontierRecord.model_validate(page.parts["frontier"])
    if page.other is None:
        return [("", own)]
    other = FrontierRecord.model_validate(page.other.parts["frontier"])
    return [(page.place or "the first", own), (page.other.place or "the second", other)]


def _curves(curves: list[tuple[str, FrontierRecord]]) -> Figure:
    figure = svg.canvas(3.4)
    axes = figure.add_subplot()
    for (name, record), color, style in zip(curves, (colours.ADAPTIVE, colours.UNIFORM), ("o-", "s--"), strict=False):
        points = sorted(record.points, key=lambda point: point.params)
        axes.plot([p.params for p in points], [p.value for p in points], style, color=color, markersize=4.5,
                  label=figures_map.shorten(name, 30))
        whose = f"{name}: " if name else ""
        svg.tips(axes, (
            (p.params, p.value, f"{whose}{count(p.params)} parameters, {record.metric} {number(p.value)}")
            for p in points
        ))  # fmt: skip
        if record.knee is not None:
            axes.plot([record.knee.params], [record.knee.value], "o", markersize=13, markerfacecolor="none",
                      markeredgecolor=colours.UNIFORM if len(curves) == 1 else color)
    axes.set(xlabel="adapter parameters", ylabel=curves[0][1].metric)
    axes.margins(0.08, 0.12)
    svg.whole(axes.xaxis)
    axes.grid(axis="y")
    if len(curves) > 1:
        svg.key(axes)
    return figure


FINISHED_SECTIONS = (
    Section("cut", "After the cut", "finished.html.j2", _cut),
    Section("frontier", "Quality against size", "finished.html.j2", _frontier),
)
