"""The figures of a run's ranks: rows from :mod:`.tables` in, matplotlib figures out.

They are drawn inside :func:`.svg.drawing`, for the page or for paper. Beyond :data:`MOST_BARS` blocks, bars become an
outline; beyond :data:`MOST_STRIPS` layers, neighbouring blocks share a strip, which shows their mean.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from . import colours, svg
from .figures_map import colour_bar, rank_map_figure, shorten
from .grids import Group, RankMap
from .tables import History, LayerRow

MOST_BARS = 64
MOST_STRIPS = 400


def rank_map_png(table: RankMap) -> bytes:
    """The rank map as a PNG as large as on the page."""
    with svg.drawing(svg.PAGE_AS_PICTURE):
        return svg.png(rank_map_figure(table))


def final_ranks_figure(rows: list[LayerRow], groups: list[Group]) -> Figure:
    """Final rank by block, one panel a role, with the equal rank that spends the same as a line; layers
    outside blocks are named bars below."""
    stacked = [g for g in groups if g.blocks[0] is not None]
    single = [i for g in groups for b, i in zip(g.blocks, g.layers, strict=True) if b is None]
    longest = max((len(g.blocks) for g in stacked), default=0)
    columns = min(len(stacked), 3 if longest <= 12 else 2 if longest <= 40 else 1, svg.medium().panels) or 1
    lines = math.ceil(len(stacked) / columns)
    tall = max((max(r.final_rank, r.initial_rank) for r in rows), default=1) or 1
    heights = ([1.5 * lines] if stacked else []) + ([0.55 + 0.2 * len(single)] if single else [])
    figure = svg.canvas(sum(heights) + 0.25, hspace=0.09)
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if stacked:
        grid = parts.pop(0).subplots(lines, columns, sharey=True, squeeze=False)
        for k, axes in enumerate(grid.flat):
            if k >= len(stacked):
                axes.set_visible(False)
                continue
            _rank_bars(axes, stacked[k], rows, tall, longest, columns)
            if k % columns == 0:
                axes.set_ylabel("rank")
            if k + columns >= len(stacked):
                axes.set_xlabel("block")
    if single:
        _named_bars(parts[0].subplots(), rows, single, tall)
    return figure


def _rank_bars(axes: Axes, group: Group, rows: list[LayerRow], tall: int, longest: int, columns: int) -> None:
    pairs = [(b, i) for b, i in zip(group.blocks, group.layers, strict=True) if b is not None]
    blocks = [b for b, _ in pairs]
    began, final = ([getattr(rows[i], name) for _, i in pairs] for name in ("initial_rank", "final_rank"))
    if longest <= MOST_BARS:
        axes.bar(blocks, began, width=0.78, color=colours.GHOST)
        _name(axes.bar(blocks, final, width=0.78, color=colours.ADAPTIVE), [i for _, i in pairs])
    else:
        edges = [b - 0.5 for b in blocks] + [blocks[-1] + 0.5]
        axes.stairs(began, edges, fill=True, color=colours.GHOST)
        axes.stairs(final, edges, fill=True, color=colours.ADAPTIVE)
    axes.axhline(rows[pairs[0][1]].uniform_rank, color=colours.UNIFORM, linewidth=1.2, linestyle=(0, (4, 2)))
    if longest * columns * 0.16 < svg.medium().width - 0.6:
        for block, rank in zip(blocks, final, strict=True):
            axes.text(block, tall * 1.04, str(rank), ha="center", va="bottom", size=8, in_layout=False)
    axes.set(ylim=(0, tall * 1.2), title=shorten(group.label))
    axes.set_xlim(min(blocks) - 0.6, max(blocks) + 0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    svg.whole(axes.yaxis, 4)
    if longest <= 12:
        axes.set_xticks(blocks)
    else:
        svg.whole(axes.xaxis, 8)


def _named_bars(axes: Axes, rows: list[LayerRow], single: list[int], tall: int) -> None:
    places, final = range(len(single)), [rows[i].final_rank for i in single]
    axes.barh(places, [rows[i].initial_rank for i in single], height=0.7, color=colours.GHOST)
    _name(axes.barh(places, final, height=0.7, color=colours.ADAPTIVE), single)
    for y, rank in zip(places, final, strict=True):
        axes.annotate(str(rank), (rank, y), (3, 0), textcoords="offset points", va="center", size=8)
    axes.axvline(rows[single[0]].uniform_rank, color=colours.UNIFORM, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.set_yticks(places, [shorten(rows[i].name, svg.medium().label) for i in single], color=colours.INK)
    axes.set(xlim=(0, tall * 1.1), ylim=(len(single) - 0.4, -0.6), xlabel="rank", title="outside blocks")
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    svg.whole(axes.xaxis)


def _name(bars: BarContainer, layers: list[int]) -> None:
    for bar, layer in zip(bars, layers, strict=True):
        bar.set_gid(f"cell{layer}")


def history_figure(table: History, groups: list[Group], marks: dict[str, int], end: int, unit: str) -> Figure:
    """Budget asked and reached, triplets dropped and returned, and every layer's rank, over the same steps."""
    rows = sum(len(group.layers) for group in groups)
    high = min(max(0.15 * rows, 0.03 * rows + 2.2), 11.0)
    figure = svg.canvas(1.6 + 1.0 + high + 0.5)
    top, churn, strip = figure.subplots(3, 1, sharex=True, height_ratios=[1.6, 1.0, high])
    end = max(end, table.steps[-1], 1)
    _budget_lines(top, table, end, unit)
    _churn_bars(churn, table, end)
    _strip(strip, table, groups, end)
    for axes in (top, churn, strip):
        for step in marks.values():
            axes.axvline(step, color=colours.MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=5)
    for name, step in marks.items():
        right = step > 0.8 * end
        top.annotate(
            name,
            (step, 1),
            (-4 if right else 4, -2),
            xycoords=("data", "axes fraction"),
            va="top",
            textcoords="offset points",
            size=8,
            color=colours.MUTED,
            ha="right" if right else "left",
        )
    strip.set_xlabel("optimizer step")
    svg.whole(strip.xaxis, 9)
    strip.set_xlim(0, end)
    return figure


def _budget_lines(axes: Axes, table: History, end: int, unit: str) -> None:
    steps = [*table.steps, end]
    for values, colour, width, name in (
        (table.asked, colours.GRID, 5.0, "asked"),
        (table.reached, colours.ADAPTIVE, 1.5, "reached"),
    ):
        axes.step(steps, [*values, values[-1]], where="post", label=name, color=colour, linewidth=width)
    axes.plot(table.steps[1:], table.reached[1:], "o", color=colours.ADAPTIVE, markersize=3)
    axes.set_title(f"Budget ({unit})")
    axes.set_ylim(0, max(*table.asked, *table.reached, 1) * 1.12)
    svg.whole(axes.yaxis, 5)
    axes.grid(axis="y")
    svg.key(axes)


def _churn_bars(axes: Axes, table: History, end: int) -> None:
    steps = table.steps[1:]
    gap = min((b - a for a, b in pairwise(steps)), default=end / 20) or end / 20
    axes.bar(steps, [-d for d in table.dropped[1:]], width=0.6 * gap, color=colours.UNIFORM, label="dropped")
    axes.bar(steps, table.returned[1:], width=0.6 * gap, color=colours.ADAPTIVE, label="returned")
    axes.axhline(0, color=colours.MUTED, linewidth=0.7)
    axes.set_title("Triplets changing sides")
    svg.whole(axes.yaxis, 4)
    axes.margins(y=0.2)
    axes.grid(axis="y")
    svg.key(axes)


def _strip(axes: Axes, table: History, groups: list[Group], end: int) -> None:
    """One row a layer, coloured by rank. Steps of equal rank are one rectangle, rectangles of one colour one path."""
    together = -(-sum(len(group.layers) for group in groups) // MOST_STRIPS)
    strips = [g.layers[k : k + together] for g in groups for k in range(0, len(g.layers), together)]
    top = max((max(ranks, default=0) for ranks in table.ranks), default=0)
    edges, gap = [*table.steps, end], 0.04 if len(strips) <= 64 else 0.0
    boxes: dict[int, list[tuple[float, float, float]]] = {}
    for y, members in enumerate(strips):
        column = [colours.level(fmean(ranks[i] for i in members), top) for ranks in table.ranks]
        start = 0
        for k in range(1, len(column) + 1):
            if k == len(column) or column[k] != column[start]:
                boxes.setdefault(column[start], []).append((edges[start], edges[k], y))
                start = k
    for step, found in sorted(boxes.items()):
        shapes = [
            Path([(a, y - 0.5 + gap), (b, y - 0.5 + gap), (b, y + 0.5 - gap), (a, y + 0.5 - gap), (a, y)], closed=True)
            for a, b, y in found
        ]
        patch = PathPatch(Path.make_compound_path(*shapes), facecolor=colours.fill(step), edgecolor="none")
        patch.set_gid(f"crisp{step}")
        axes.add_patch(patch)
    ends, y = [], 0
    for group in groups:
        rows = -(-len(group.layers) // together)
        ends.append((y + rows / 2 - 0.5, group.label))
        y += rows
        if y < len(strips):
            axes.axhline(y - 0.5, color=colours.SURFACE, linewidth=2.5 if len(strips) < 200 else 0.8)
    axes.set_yticks([p for p, _ in ends], [shorten(name, svg.medium().label) for _, name in ends], color=colours.INK)
    axes.set_ylim(len(strips) - 0.5, -0.5)
    axes.set_title("Rank of each layer" + (" (blocks from top to bottom within a role)" if svg.medium().page else ""))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    ticks = sorted({0, top // 2, top})
    places = [(0.5 + t / top * (colours.LEVELS - 1)) / colours.LEVELS if top else 0.03 for t in ticks]
    scale = [colours.fill(step) for step in range(colours.LEVELS)]
    colour_bar(axes, scale, places, [str(t) for t in ticks], "rank", 1.0 if top else 0.3)
