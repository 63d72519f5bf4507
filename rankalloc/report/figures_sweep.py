"""The figures of a sweep: front, importances, slices."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..trace import RankChoice
from . import colours, svg
from .sweeps import FrontPoint, Slice
from .wording import count, fixed, number, printable

LOOKS: dict[RankChoice, dict[str, Any]] = {
    "adaptive": {"marker": "o", "color": colours.ADAPTIVE},
    "uniform": {"marker": "s", "color": colours.UNIFORM},
    "control": {"marker": "^", "color": colours.MUTED},
    "given": {"marker": "D", "color": colours.MUTED},
}


def front_figure(points: list[FrontPoint], metric: str) -> Figure:
    """Adapter parameters against the metric; the front joined by a line, the best trial ringed."""
    figure = svg.canvas(3.7)
    axes = figure.add_subplot()
    front = [p for p in points if p.front]
    if front:
        axes.plot(
            [p.size for p in front],
            [p.value for p in front],
            color=colours.MUTED,
            linewidth=1,
            zorder=1,
            label="front",
        )
    for choice, look in LOOKS.items():
        members = [p for p in points if p.choice == choice]
        if members:
            axes.plot(
                [p.size for p in members],
                [p.value for p in members],
                linestyle="none",
                markersize=7,
                alpha=0.85,
                markeredgecolor=colours.SURFACE,
                markeredgewidth=0.8,
                label=choice,
                **look,
            )
    best = next((p for p in points if p.best), None)
    if best is not None:
        axes.plot(
            [best.size],
            [best.value],
            "o",
            markersize=13,
            markerfacecolor="none",
            markeredgewidth=1.3,
            markeredgecolor=colours.INK,
            linestyle="none",
            label="best",
        )
    for point in points:
        if point.front or point.best or len(points) <= 12:
            axes.annotate(str(point.number), (point.size, point.value), (8, 5), textcoords="offset points", size=8)
    sizes = [p.size for p in points]
    if min(sizes) > 0 and max(sizes) > 8 * min(sizes):
        svg.logarithmic(axes, "x", min(sizes) / 1.25, max(sizes) * 1.25)
    else:
        axes.margins(x=0.08)
        svg.whole(axes.xaxis)
    axes.margins(y=0.12)
    svg.tips(axes, (
        (p.size, p.value, f"trial {p.number}, {p.choice}: {count(p.size)} parameters, {metric} {number(p.value)}")
        for p in points
    ))  # fmt: skip
    axes.set(xlabel="adapter parameters", ylabel=printable(metric))
    axes.grid()
    svg.key(axes, 4)
    return figure


def importances_figure(pairs: list[tuple[str, float]]) -> Figure:
    """One bar for each parameter, most important first."""
    figure = svg.canvas(0.45 + 0.27 * len(pairs), 6.4)
    axes = figure.add_subplot()
    places = range(len(pairs))
    axes.barh(places, [v for _, v in pairs], color=colours.ADAPTIVE, height=0.66)
    for y, (_, value) in zip(places, pairs, strict=True):
        axes.annotate(
            fixed(value, 2), (max(value, 0), y), (4, 0), textcoords="offset points", va="center", size=8.5
        )
    axes.set_yticks(places, [printable(name) for name, _ in pairs], color=colours.INK)
    axes.set(
        ylim=(len(pairs) - 0.4, -0.6), xlim=(0, max(max(v for _, v in pairs), 0.01) * 1.15), xlabel="importance"
    )
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    return figure


def slices_figure(slices: list[Slice], metric: str) -> Figure:
    """The value of each trial against each parameter, a panel a parameter."""
    columns = min(svg.medium().panels, len(slices))
    lines = math.ceil(len(slices) / columns)
    figure = svg.canvas(2.0 * lines + 0.3)
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for k, axes in enumerate(grid.flat):
        if k >= len(slices):
            axes.set_visible(False)
            continue
        _slice(axes, slices[k], metric)
        if k % columns == 0:
            axes.set_ylabel(printable(metric))
    handles, names = [], []
    for choice, look in LOOKS.items():
        if any(p.choice == choice for s in slices for p in s.points):
            handles.append(Line2D([], [], linestyle="none", markersize=5, **look))
            names.append(choice)
    figure.legend(handles, names, loc="outside upper right", ncols=max(2, len(names)))
    return figure


def _slice(axes: Axes, piece: Slice, metric: str) -> None:
    places: dict[str, int] = {}
    if not piece.numeric:
        for name in sorted({printable(p.x) for p in piece.points}):
            places[name] = len(places)
    for choice, look in LOOKS.items():
        members = [p for p in piece.points if p.choice == choice]
        if not members and choice not in ("adaptive", "uniform"):
            continue
        xs = [p.x if piece.numeric else places[printable(p.x)] for p in members]
        axes.plot(
            xs,
            [p.value for p in members],
            linestyle="none",
            markersize=4.5,
            alpha=0.85,
            markeredgecolor=colours.SURFACE,
            markeredgewidth=0.5,
            **look,
        )
    if piece.log:
        values = [p.x for p in piece.points]
        svg.logarithmic(axes, "x", min(values) / 1.4, max(values) * 1.4)
    distinct = sorted({p.x for p in piece.points}) if piece.numeric else []
    if piece.numeric and not piece.log and len(distinct) <= 6 and all(float(x).is_integer() for x in distinct):
        axes.set_xticks(distinct, [f"{x:g}" for x in distinct])
        axes.margins(x=0.1)
    elif piece.numeric and not piece.log:
        axes.margins(x=0.1)
        axes.locator_params(axis="x", nbins=5)
    elif not piece.numeric:
        axes.set_xticks(list(places.values()), [n if len(n) <= 16 else n[:15] + "…" for n in places])
        axes.set_xlim(-0.6, len(places) - 0.4)
    axes.margins(y=0.12)
    svg.tips(axes, (
        (p.x if piece.numeric else places[printable(p.x)], p.value,
         f"trial {p.number}, {p.choice}: {piece.name} {number(p.x, 6) if piece.numeric else p.x}, {metric} "
         f"{number(p.value)}")
        for p in piece.points
    ))  # fmt: skip
    axes.set_xlabel(printable(piece.name), color=colours.INK)
    axes.grid(axis="y")
