"""Maps: roles × blocks, a number in each cell. Each cell of the page's drawing names its layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from . import colours, svg
from .grids import OUTSIDE, RankMap
from .wording import printable, rank, signed

OUTSIDE_GAP = 0.5  # columns between the blocks and the layers outside them
LEAST_CELL = 0.17  # inches: a narrower cell holds no number of two digits
_EMPTY: dict[str, Any] = {
    "facecolor": "none", "edgecolor": colours.MUTED, "linestyle": (0, (2, 2)), "linewidth": 0.8,
}

Paint = Callable[[int], tuple[dict[str, Any], str]]
"""From a cell's value to how its rectangle looks and the colour of its number."""


def rank_map_figure(table: RankMap, top: int | None = None) -> Figure:
    """Ranks on the scale from 0 to ``top``, the highest when None; rank 0 is an empty dashed cell. Means stand at the
    edges."""
    highest = max((c for row in table.cells for c in row if c is not None), default=0) if top is None else top

    def paint(value: int) -> tuple[dict[str, Any], str]:
        step = colours.level(value, highest)
        if value == 0:
            return _EMPTY, colours.INK
        return {"facecolor": colours.fill(step), "edgecolor": "none"}, colours.text_on(step)

    ends = [(k, colours.fill(k)) for k in range(colours.LEVELS)]
    return _map(table, paint, str, rank, ends, ["0", str(highest)])


def delta_map_figure(table: RankMap) -> Figure:
    """Differences on a scale that is as long to either side; zero is its pale middle."""
    most = max((abs(c) for row in table.cells for c in row if c is not None), default=0)

    def paint(value: int) -> tuple[dict[str, Any], str]:
        step = colours.delta(value, most)
        return {"facecolor": colours.delta_fill(step), "edgecolor": "none"}, colours.text_on_delta(step)

    ends = [(k, colours.delta_fill(k)) for k in range(colours.DELTAS)]
    return _map(table, paint, signed, lambda mean: signed(mean, 1), ends, [signed(-most), signed(most)])


def _map(
    table: RankMap, paint: Paint, text: Callable[[int], str], mean: Callable[[float], str],
    scale: list[tuple[int, str]], ends: list[str],
) -> Figure:
    n_rows, n_columns = len(table.roles), len(table.columns)
    roles = [shorten(role, 60 if svg.medium().page else svg.medium().label + 6) for role in table.roles]
    figure = svg.canvas(0.75 + 0.36 * n_rows, max(svg.PAGE.width, 2.6 + 0.3 * n_columns))
    labels = 0.075 * max(map(len, roles), default=0) + 0.2
    numbers = svg.medium().page or (svg.medium().width - labels) / (n_columns + 1) >= LEAST_CELL
    axes = figure.add_subplot()
    at = [j + (OUTSIDE_GAP if table.outside and j == n_columns - 1 else 0) for j in range(n_columns)]
    size = 9 if n_columns <= 26 and svg.medium().page else 8
    for i, row in enumerate(table.cells):
        for j, value in enumerate(row):
            if value is None:
                continue
            look, colour = paint(value)
            layer = table.layers[i][j]
            name = None if layer is None else f"cell{layer}"
            axes.add_patch(Rectangle((at[j] - 0.47, i - 0.46), 0.94, 0.92, gid=name, clip_on=False, **look))
            if numbers:
                axes.text(at[j], i, text(value), ha="center", va="center", size=size, color=colour, in_layout=False,
                          gid=name)
    edge = at[-1] + 1.05
    if numbers:
        quiet: dict[str, Any] = {"ha": "center", "va": "center", "color": colours.MUTED, "size": 8.5}
        for i, value_of_row in enumerate(table.row_means):
            axes.text(edge, i, mean(value_of_row), gid="mean", **quiet)
        for x, value_of_column in zip(at, table.column_means, strict=True):
            axes.text(x, n_rows - 0.1, mean(value_of_column), gid="mean", **quiet)
        axes.text(edge, n_rows - 0.1, "mean", **quiet)
    axes.set(xlim=(-0.55, edge + 0.5 if numbers else at[-1] + 0.55), ylim=(n_rows + 0.25 if numbers else n_rows, -0.55))
    shown = range(0, n_columns, 1 if numbers else -(-n_columns // 6))
    axes.set_xticks([at[j] for j in shown], ["outside" if table.columns[j] == OUTSIDE else table.columns[j]
                                             for j in shown])
    axes.set_yticks(range(n_rows), roles, color=colours.INK)
    axes.xaxis.tick_top()
    axes.set_xlabel("block" if table.columns != [OUTSIDE] else "")
    axes.xaxis.set_label_position("top")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    if not numbers:
        colour_bar(axes, [colour for _, colour in scale], [0.0, 1.0], ends)
    return figure


def colour_bar(
    axes: Axes, scale: Sequence[str], places: Sequence[float], ticks: Sequence[str], title: str = "", tall: float = 1.0
) -> None:
    """The scale's colours from bottom to top in a bar at the right of ``axes``, with ``ticks`` at ``places``."""
    bar = axes.inset_axes((1.015, 0.0, 0.014 if svg.medium().page else 0.025, tall))
    for step, colour in enumerate(scale):
        bar.add_patch(
            Rectangle((0, step / len(scale)), 1, 1 / len(scale), facecolor=colour, edgecolor="none",
                      gid=f"crispbar{step}")
        )
    bar.yaxis.tick_right()
    bar.set_yticks(places, ticks)
    bar.set(xticks=[], xlim=(0, 1), ylim=(0, 1))
    if title:
        bar.set_title(title, loc="left", size=8, color=colours.MUTED)
    for spine in bar.spines.values():
        spine.set_visible(False)
    bar.tick_params(length=0)


def shorten(name: str, most: int = 42) -> str:
    """The end of a long name, its distinctive part."""
    name = printable(name)
    return name if len(name) <= most else "…" + name[-(most - 1) :]
