"""The figures of a run: rows from :mod:`.tables` in, SVG strings out. ``prefix`` starts the figure's ids;
``label`` is read aloud by screen readers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from . import svg
from .tables import OUTSIDE, Group, History, LayerRow, RankMap
from .wording import printable, rank

OUTSIDE_GAP = 0.5  # columns between the blocks and the layers outside them


def rank_map_figure(table: RankMap, prefix: str, label: str) -> str:
    """Roles × blocks, a number in each cell, means at the edges; rank 0 is an empty dashed cell."""
    with svg.drawing():
        return svg.finish(_rank_map(table), prefix, label)


def rank_map_png(table: RankMap) -> bytes:
    """The same as a PNG."""
    with svg.drawing():
        return svg.png(_rank_map(table))


def _rank_map(table: RankMap) -> Figure:
    n_rows, n_columns = len(table.roles), len(table.columns)
    top = max((c for row in table.cells for c in row if c is not None), default=0)
    figure = svg.canvas(0.75 + 0.36 * n_rows, max(svg.WIDTH, 2.6 + 0.3 * n_columns))
    axes = figure.add_subplot()
    at = [j + (OUTSIDE_GAP if table.outside and j == n_columns - 1 else 0) for j in range(n_columns)]
    size = 9 if n_columns <= 26 else 8
    for i, row in enumerate(table.cells):
        for x, value in zip(at, row, strict=True):
            if value is not None:
                _cell(axes, x, i, value, top, size)
    edge = at[-1] + 1.05
    for i, mean in enumerate(table.row_means):
        axes.text(edge, i, rank(mean), ha="center", va="center", color=svg.MUTED, size=8.5)
    for x, mean in zip(at, table.column_means, strict=True):
        axes.text(x, n_rows - 0.1, rank(mean), ha="center", va="center", color=svg.MUTED, size=8.5)
    axes.text(edge, n_rows - 0.1, "mean", ha="center", va="center", color=svg.MUTED, size=8.5)
    axes.set(xlim=(-0.55, edge + 0.5), ylim=(n_rows + 0.25, -0.55))
    axes.set_xticks(at, ["outside" if c == OUTSIDE else c for c in table.columns])
    axes.set_yticks(range(n_rows), [printable(role) for role in table.roles], color=svg.INK)
    axes.xaxis.tick_top()
    axes.set_xlabel("block" if table.columns != [OUTSIDE] else "")
    axes.xaxis.set_label_position("top")
    _bare(axes)
    return figure


def _cell(axes: Axes, x: float, y: float, value: int, top: int, size: float) -> None:
    step = svg.level(value, top)
    look: dict[str, Any] = {"facecolor": svg.fill(step), "edgecolor": "none"}
    if value == 0:
        look = {"facecolor": "none", "edgecolor": svg.MUTED, "linestyle": (0, (2, 2)), "linewidth": 0.8}
    axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, **look))
    colour = svg.INK if value == 0 else svg.text_on(step)
    axes.text(x, y, str(value), ha="center", va="center", size=size, color=colour, in_layout=False)


def final_ranks_figure(rows: list[LayerRow], groups: list[Group], prefix: str, label: str) -> str:
    """Final rank by block, one panel a role, with the equal rank that spends the same as a line; layers
    outside blocks are named bars below."""
    stacked = [g for g in groups if g.blocks[0] is not None]
    single = [i for g in groups for b, i in zip(g.blocks, g.layers, strict=True) if b is None]
    longest = max((len(g.blocks) for g in stacked), default=0)
    columns = min(len(stacked), 3 if longest <= 12 else 2 if longest <= 40 else 1) or 1
    lines = math.ceil(len(stacked) / columns)
    tall = max((max(r.final_rank, r.initial_rank) for r in rows), default=1) or 1
    with svg.drawing():
        heights = ([1.5 * lines] if stacked else []) + ([0.55 + 0.2 * len(single)] if single else [])
        figure = svg.canvas(sum(heights) + 0.25, hspace=0.09)
        parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        if stacked:
            grid = parts.pop(0).subplots(lines, columns, sharey=True, squeeze=False)
            for k, axes in enumerate(grid.flat):
                if k >= len(stacked):
                    axes.set_visible(False)
                    continue
                _rank_bars(axes, stacked[k], rows, tall, longest)
                if k % columns == 0:
                    axes.set_ylabel("rank")
                if k + columns >= len(stacked):
                    axes.set_xlabel("block")
        if single:
            _named_bars(parts[0].subplots(), [rows[i] for i in single], tall)
        return svg.finish(figure, prefix, label)


def _rank_bars(axes: Axes, group: Group, rows: list[LayerRow], tall: int, longest: int) -> None:
    pairs = [(b, rows[i]) for b, i in zip(group.blocks, group.layers, strict=True) if b is not None]
    blocks = [b for b, _ in pairs]
    axes.bar(blocks, [r.initial_rank for _, r in pairs], width=0.78, color=svg.GHOST)
    axes.bar(blocks, [r.final_rank for _, r in pairs], width=0.78, color=svg.ADAPTIVE)
    axes.axhline(pairs[0][1].uniform_rank, color=svg.UNIFORM, linewidth=1.2, linestyle=(0, (4, 2)))
    if longest <= 40:
        for block, row in pairs:
            axes.text(
                block,
                tall * 1.04,
                str(row.final_rank),
                ha="center",
                va="bottom",
                size=8.5 if longest <= 16 else 6.5,
                in_layout=False,
            )
    axes.set(ylim=(0, tall * 1.2), title=printable(group.label))
    axes.set_xlim(min(blocks) - 0.6, max(blocks) + 0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    svg.whole(axes.yaxis, 4)
    if longest <= 12:
        axes.set_xticks(blocks)
    else:
        svg.whole(axes.xaxis, 8)


def _named_bars(axes: Axes, rows: list[LayerRow], tall: int) -> None:
    places = range(len(rows))
    axes.barh(places, [r.initial_rank for r in rows], height=0.7, color=svg.GHOST)
    axes.barh(places, [r.final_rank for r in rows], height=0.7, color=svg.ADAPTIVE)
    for y, row in zip(places, rows, strict=True):
        axes.annotate(str(row.final_rank), (row.final_rank, y), (3, 0), textcoords="offset points", va="center", size=8)
    axes.axvline(rows[0].uniform_rank, color=svg.UNIFORM, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.set_yticks(places, [_shorten(r.name) for r in rows], color=svg.INK)
    axes.set(xlim=(0, tall * 1.1), ylim=(len(rows) - 0.4, -0.6), xlabel="rank", title="outside blocks")
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    svg.whole(axes.xaxis)


def history_figure(
    table: History, groups: list[Group], marks: dict[str, int], end: int, unit: str, prefix: str, label: str
) -> str:
    """Budget asked and reached, triplets dropped and returned, and every layer's rank, over the same steps."""
    rows = [i for group in groups for i in group.layers]
    high = min(max(0.15 * len(rows), 0.03 * len(rows) + 2.2), 11.0)
    with svg.drawing():
        figure = svg.canvas(1.6 + 1.0 + high + 0.5)
        top, churn, strip = figure.subplots(3, 1, sharex=True, height_ratios=[1.6, 1.0, high])
        end = max(end, table.steps[-1], 1)
        _budget_lines(top, table, end, unit)
        _churn_bars(churn, table, end)
        _strip(strip, table, groups, end)
        for axes in (top, churn, strip):
            for step in marks.values():
                axes.axvline(step, color=svg.MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=5)
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
                color=svg.MUTED,
                ha="right" if right else "left",
            )
        strip.set_xlabel("optimizer step")
        svg.whole(strip.xaxis, 9)
        strip.set_xlim(0, end)
        return svg.finish(figure, prefix, label)


def _budget_lines(axes: Axes, table: History, end: int, unit: str) -> None:
    steps = [*table.steps, end]
    for values, colour, width, name in (
        (table.asked, svg.GRID, 5.0, "asked"),
        (table.reached, svg.ADAPTIVE, 1.5, "reached"),
    ):
        axes.step(steps, [*values, values[-1]], where="post", label=name, color=colour, linewidth=width)
    axes.plot(table.steps[1:], table.reached[1:], "o", color=svg.ADAPTIVE, markersize=3)
    axes.set_title(f"Budget ({unit})")
    axes.set_ylim(0, max(*table.asked, *table.reached, 1) * 1.12)
    svg.whole(axes.yaxis, 5)
    axes.grid(axis="y")
    svg.key(axes)


def _churn_bars(axes: Axes, table: History, end: int) -> None:
    steps = table.steps[1:]
    gap = min((b - a for a, b in pairwise(steps)), default=end / 20) or end / 20
    axes.bar(steps, [-d for d in table.dropped[1:]], width=0.6 * gap, color=svg.UNIFORM, label="dropped")
    axes.bar(steps, table.returned[1:], width=0.6 * gap, color=svg.ADAPTIVE, label="returned")
    axes.axhline(0, color=svg.MUTED, linewidth=0.7)
    axes.set_title("Triplets changing sides")
    svg.whole(axes.yaxis, 4)
    axes.margins(y=0.2)
    axes.grid(axis="y")
    svg.key(axes)


def _strip(axes: Axes, table: History, groups: list[Group], end: int) -> None:
    """One row a layer, coloured by rank. Steps of equal rank are one rectangle, rectangles of one colour one path."""
    order = [i for group in groups for i in group.layers]
    top = max((max(ranks, default=0) for ranks in table.ranks), default=0)
    edges, gap = [*table.steps, end], 0.04 if len(order) <= 64 else 0.0
    boxes: dict[int, list[tuple[float, float, float]]] = {}
    for y, i in enumerate(order):
        column = [ranks[i] for ranks in table.ranks]
        start = 0
        for k in range(1, len(column) + 1):
            if k == len(column) or column[k] != column[start]:
                boxes.setdefault(svg.level(column[start], top), []).append((edges[start], edges[k], y))
                start = k
    for step, members in sorted(boxes.items()):
        shapes = [
            Path([(a, y - 0.5 + gap), (b, y - 0.5 + gap), (b, y + 0.5 - gap), (a, y + 0.5 - gap), (a, y)], closed=True)
            for a, b, y in members
        ]
        patch = PathPatch(Path.make_compound_path(*shapes), facecolor=svg.fill(step), edgecolor="none")
        patch.set_gid(f"crisp{step}")
        axes.add_patch(patch)
    ends, y = [], 0
    for group in groups:
        ends.append((y + len(group.layers) / 2 - 0.5, group.label))
        y += len(group.layers)
        if y < len(order):
            axes.axhline(y - 0.5, color=svg.SURFACE, linewidth=2.5)
    axes.set_yticks([p for p, _ in ends], [_shorten(name) for _, name in ends], color=svg.INK)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_title("Rank of each layer (blocks from top to bottom within a role)")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _colour_bar(axes, top)


def _colour_bar(axes: Axes, top: int) -> None:
    bar = axes.inset_axes((1.015, 0.0, 0.014, 1.0 if top else 0.3))
    for step in range(svg.LEVELS):
        patch = bar.add_patch(
            Rectangle((0, step / svg.LEVELS), 1, 1 / svg.LEVELS, facecolor=svg.fill(step), edgecolor="none")
        )
        patch.set_gid(f"crispbar{step}")
    ticks = sorted({0, top // 2, top})
    places = [(0.5 + t / top * (svg.LEVELS - 1)) / svg.LEVELS if top else 0.03 for t in ticks]
    bar.yaxis.tick_right()
    bar.set_yticks(places, [str(t) for t in ticks])
    bar.set(xticks=[], xlim=(0, 1), ylim=(0, 1))
    bar.set_title("rank", loc="left", size=8, color=svg.MUTED)
    for spine in bar.spines.values():
        spine.set_visible(False)
    bar.tick_params(length=0)


def _bare(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def _shorten(name: str, most: int = 42) -> str:
    """The end of a long name, its distinctive part."""
    name = printable(name)
    return name if len(name) <= most else "…" + name[-(most - 1) :]
