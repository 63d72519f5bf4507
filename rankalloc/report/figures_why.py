"""The figures of a run that explain its ranks: scores, margin, spectra.

With very many layers each one's triplets are a bar from the lowest to the highest, and spectra are a choice of blocks.
"""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import colours, svg
from .figures_map import shorten
from .grids import Group
from .tables import History, LayerRow, ScoreTable, thin
from .wording import printable, some

SCALE_SPAN = 1e-9  # scores below this share of the largest are drawn at the foot of the axis
MOST_DASHES = 20_000  # triplets that are drawn one by one
MOST_BLOCKS = 24  # of a role whose spectra are drawn, where there are more than twice as many
MOST_PLACES = 400  # layers that are drawn as bars


def scores_figure(table: ScoreTable, groups: list[Group]) -> Figure:
    """Each layer's kept and dropped scores on a log axis, and their distributions on the same axis."""
    positive = [s for side in (table.kept, table.dropped) for layer in side for s in layer if s > 0]
    top = max(positive)
    low = max(min(positive), top * SCALE_SPAN)
    figure = svg.canvas(3.6)
    layers, spread = svg.beside(figure, (3.4, 1), sharey=True)
    order = [i for group in groups for i in group.layers]
    for values, colour, width, half, name in (
        (table.dropped, colours.UNIFORM, 0.8, 0.26, "dropped"),
        (table.kept, colours.ADAPTIVE, 1.8, 0.4, "kept"),
    ):
        xs, ys = [], []
        for x, i in enumerate(order):
            drawn = [max(score, low) for score in values[i] if score > 0]
            if len(positive) > MOST_DASHES:  # one upright bar a layer, as wide as the line
                xs += [x, x, math.nan] if drawn else []
                ys += [min(drawn), max(drawn), math.nan] if drawn else []
                continue
            for score in drawn:
                xs += [x - half, x + half, math.nan]
                ys += [score, score, math.nan]
        if xs:
            layers.plot(xs, ys, color=colour, linewidth=width, label=name)
    svg.logarithmic(layers, "y", low / 1.6, top * 1.6)
    if table.lowest_kept is not None and table.lowest_kept > 0:
        for axes in (layers, spread):
            axes.axhline(table.lowest_kept, color=colours.INK, linewidth=0.8, linestyle=(0, (1, 2)))
    x = 0
    for group in groups:
        x += len(group.layers)
        if x < len(order):
            layers.axvline(x - 0.5, color=colours.GRID, linewidth=0.8)
    _group_ticks(layers, groups)
    layers.set(xlim=(-0.6, len(order) - 0.4), ylabel=f"score ({printable(table.score)})")
    svg.key(layers)
    _distribution(spread, table, low, top)
    return figure


def _distribution(axes: Axes, table: ScoreTable, low: float, top: float) -> None:
    bins = 24
    ratio = max(top / low, 1.001) * 1.02
    edges = [low * 0.99 * ratio ** (k / bins) for k in range(bins + 1)]
    for values, colour, hatch, name in (
        (table.kept, colours.ADAPTIVE, None, "kept"),
        (table.dropped, colours.UNIFORM, "/////", "dropped"),
    ):
        flat = [max(s, low) for layer in values for s in layer if s > 0]
        if flat:
            hollow = {"facecolor": "none", "edgecolor": colour, "hatch": hatch}
            look: dict[str, Any] = {"color": colour} if hatch is None else hollow
            axes.hist(flat, bins=edges, orientation="horizontal", linewidth=0.7, label=name, **look)
    axes.set_xlabel("triplets")
    axes.tick_params(axis="y", length=0)
    svg.whole(axes.xaxis, 4)


def _group_ticks(axes: Axes, groups: list[Group]) -> None:
    places, x = [], 0
    for group in groups:
        places.append(x + len(group.layers) / 2 - 0.5)
        x += len(group.layers)
    names = [printable(g.label) for g in groups]
    slanted = sum(len(n) for n in names) > 5 * svg.medium().width or len(names) > 7
    names = [shorten(n, 24) for n in names]
    if len(names) > 4.8 * svg.medium().width:
        axes.set_xticks([])
        axes.set_xlabel("layer")
        return
    axes.set_xticks(
        places,
        names,
        color=colours.INK,
        rotation=28 if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor",
    )
    axes.tick_params(axis="x", length=0)


def margin_figure(table: History) -> Figure:
    """Lowest kept and highest dropped score at each allocation."""
    points = [(s, k, d) for s, k, d in zip(table.steps, table.lowest_kept, table.highest_dropped, strict=True)]
    kept = [(s, k) for s, k, _ in points if k is not None and k > 0]
    dropped = [(s, d) for s, _, d in points if d is not None and d > 0]
    values = [v for _, v in kept + dropped]
    figure = svg.canvas(5.0 if svg.medium().narrow else 2.5)
    axes, ratio = svg.beside(figure, (1.6, 1))
    for line, colour, marker, name in (
        (kept, colours.ADAPTIVE, "o", "lowest kept"),
        (dropped, colours.UNIFORM, "s", "highest dropped"),
    ):
        if line:
            axes.plot(
                *zip(*line, strict=True), color=colour, marker=marker, markersize=3.5, linewidth=1.2, label=name
            )
    svg.logarithmic(axes, "y", min(values) / 1.5, max(values) * 1.5)
    axes.set(xlabel="optimizer step", ylabel="score")
    svg.key(axes)
    ratio.axhline(1, color=colours.MUTED, linewidth=0.8)
    ratio.plot(
        [s for s, k, d in points if k and d and d > 0],
        [k / d for s, k, d in points if k and d and d > 0],
        color=colours.INK,
        marker="o",
        markersize=3.5,
        linewidth=1.2,
    )
    ratio.set(xlabel="optimizer step", title="Margin: lowest kept / highest dropped")
    for each in (axes, ratio):
        svg.whole(each.xaxis, 8)
        each.grid(axis="y")
    return figure


def spectra_figure(sigma: list[list[float]], groups: list[Group]) -> Figure:
    """Singular values by index, one panel a role, one line a layer, darker for deeper blocks."""
    shown = [g for g in groups if any(s > 0 for i in g.layers for s in sigma[i])]
    if len(shown) > 12:  # many layers that share no role: one panel holds them all
        shown = [Group("all layers", [None] * sum(len(g.layers) for g in shown), [i for g in shown for i in g.layers])]
    top = max(s for values in sigma for s in values)
    low = max(min(s for values in sigma for s in values if s > 0), top * 1e-6)
    columns = min(svg.medium().panels, len(shown))
    lines = math.ceil(len(shown) / columns)
    longest = max(len(values) for values in sigma)
    deepest = max((b for g in shown for b in g.blocks if b is not None), default=0)
    figure = svg.canvas(1.7 * lines + 0.35)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for k, axes in enumerate(grid.flat):
        if k >= len(shown):
            axes.set_visible(False)
            continue
        members = list(enumerate(zip(shown[k].blocks, shown[k].layers, strict=True)))
        if len(members) > 2 * MOST_BLOCKS:
            members = [members[j] for j in thin(len(members), MOST_BLOCKS)]
        for place, (block, i) in members:
            values = [s for s in sigma[i] if s > 0]
            depth = block if block is not None else place
            of = deepest if block is not None else max(1, len(shown[k].layers) - 1)
            step = 4 + round(11 * (depth / of if of else 1))
            axes.plot(
                range(1, len(values) + 1),
                [max(s, low) for s in values],
                color=colours.fill(step),
                linewidth=1.3,
                marker="o",
                markersize=2.6,
            )
        axes.set_title(shorten(shown[k].label))
        svg.logarithmic(axes, "y", low / 1.5, top * 1.5)
        axes.set_xlim(0.5, longest + 0.5)
        axes.grid(axis="y")
        svg.whole(axes.xaxis, 6)
        if k % columns == 0:
            axes.set_ylabel("singular value")
        if k + columns >= len(shown):
            axes.set_xlabel("index")
            axes.tick_params(labelbottom=True)
    return figure


def _at(row: LayerRow, places: int) -> tuple[int, float] | None:
    """Where a layer's point is; None for a layer without one."""
    return None if row.effective_rank is None else (row.final_rank, round(row.effective_rank, places))


def effective_figure(rows: list[LayerRow], groups: list[Group]) -> Figure:
    """Effective against allotted rank: all layers as points (a layer on the diagonal uses its whole rank),
    and layer by layer as bars."""
    places = 3 if len(rows) <= MOST_PLACES else 1
    points = sorted({at for r in rows if (at := _at(r, places)) is not None})
    top = max(max(x, y) for x, y in points)
    order = [rows[i] for group in groups for i in group.layers]
    figure = svg.canvas(5.6 if svg.medium().narrow else 3.2)
    axes, bars = svg.beside(figure, (1, 1.9))
    axes.plot([0, top], [0, top], color=colours.MUTED, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.plot(*zip(*points, strict=True), "o", color=colours.ADAPTIVE, markersize=5, alpha=0.65, markeredgewidth=0)
    axes.set(xlim=(0, top * 1.06), ylim=(0, top * 1.06), xlabel="rank allotted", ylabel="effective rank")
    if len(rows) <= MOST_PLACES:
        svg.tips(axes, (
            (x, y, f"{some([r.name for r in rows if _at(r, places) == (x, y)], 3)}: rank {x}, effective {y:.2f}")
            for x, y in points
        ))  # fmt: skip
    svg.whole(axes.xaxis)
    axes.grid()
    for values, colour, name in (
        ([r.final_rank for r in order], colours.GHOST, "allotted"),
        ([r.effective_rank or 0 for r in order], colours.ADAPTIVE, "effective"),
    ):
        if len(order) <= MOST_PLACES:
            bars.bar(range(len(order)), values, width=0.8, color=colour, label=name)
        else:
            bars.stairs(values, [k - 0.5 for k in range(len(order) + 1)], fill=True, color=colour, label=name)
    x = 0
    for group in groups[:-1]:
        x += len(group.layers)
        bars.axvline(x - 0.5, color=colours.GRID, linewidth=0.8)
    bars.set(xlim=(-0.6, len(order) - 0.4), ylim=(0, top * 1.06))
    _group_ticks(bars, groups)
    svg.key(bars)
    for each in (axes, bars):
        svg.whole(each.yaxis)
    return figure
