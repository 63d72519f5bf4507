"""The figures of a sweep: front, importances, slices."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from . import svg
from .sweeps import Slice, TrialRow
from .wording import fixed, printable

LOOKS = {False: {"marker": "o", "color": svg.ADAPTIVE}, True: {"marker": "s", "color": svg.UNIFORM}}
NAMES = {False: "adaptive", True: "uniform"}


def front_figure(rows: list[TrialRow], metric: str, prefix: str, label: str) -> str:
    """Adapter parameters against the metric; the front joined by a line, the best trial ringed."""
    with svg.drawing():
        figure = svg.canvas(3.7)
        axes = figure.add_subplot()
        front = [r for r in rows if r.front]
        if front:
            axes.plot(
                [r.adapter_params for r in front],
                [r.value for r in front],
                color=svg.MUTED,
                linewidth=1,
                zorder=1,
                label="front",
            )
        for uniform in (False, True):
            members = [r for r in rows if r.uniform == uniform]
            if members:
                axes.plot(
                    [r.adapter_params for r in members],
                    [r.value for r in members],
                    linestyle="none",
                    markersize=7,
                    alpha=0.85,
                    markeredgecolor=svg.SURFACE,
                    markeredgewidth=0.8,
                    label=NAMES[uniform],
                    **LOOKS[uniform],
                )
        best = next((r for r in rows if r.best), None)
        if best is not None:
            axes.plot(
                [best.adapter_params],
                [best.value],
                "o",
                markersize=13,
                markerfacecolor="none",
                markeredgewidth=1.3,
                markeredgecolor=svg.INK,
                linestyle="none",
                label="best",
            )
        for row in rows:
            if row.front or row.best or len(rows) <= 12:
                axes.annotate(
                    str(row.number), (row.adapter_params, row.value), (8, 5), textcoords="offset points", size=8
                )
        sizes = [r.adapter_params for r in rows]
        if min(sizes) > 0 and max(sizes) > 8 * min(sizes):
            svg.logarithmic(axes, "x", min(sizes) / 1.25, max(sizes) * 1.25)
        else:
            axes.margins(x=0.08)
            svg.whole(axes.xaxis)
        axes.margins(y=0.12)
        axes.set(xlabel="adapter parameters", ylabel=printable(metric))
        axes.grid()
        svg.key(axes, 4)
        return svg.finish(figure, prefix, label)


def importances_figure(pairs: list[tuple[str, float]], prefix: str, label: str) -> str:
    with svg.drawing():
        figure = svg.canvas(0.45 + 0.27 * len(pairs), 6.4)
        axes = figure.add_subplot()
        places = range(len(pairs))
        axes.barh(places, [v for _, v in pairs], color=svg.ADAPTIVE, height=0.66)
        for y, (_, value) in zip(places, pairs, strict=True):
            axes.annotate(
                fixed(value, 2), (max(value, 0), y), (4, 0), textcoords="offset points", va="center", size=8.5
            )
        axes.set_yticks(places, [printable(name) for name, _ in pairs], color=svg.INK)
        axes.set(
            ylim=(len(pairs) - 0.4, -0.6), xlim=(0, max(max(v for _, v in pairs), 0.01) * 1.15), xlabel="importance"
        )
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        return svg.finish(figure, prefix, label)


def slices_figure(slices: list[Slice], metric: str, prefix: str, label: str) -> str:
    """The value of each trial against one parameter a panel."""
    columns = min(3, len(slices))
    lines = math.ceil(len(slices) / columns)
    with svg.drawing():
        figure = svg.canvas(2.0 * lines + 0.3)
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for k, axes in enumerate(grid.flat):
            if k >= len(slices):
                axes.set_visible(False)
                continue
            _slice(axes, slices[k])
            if k % columns == 0:
                axes.set_ylabel(printable(metric))
        handles, names = [], []
        for uniform in (False, True):
            if any(p.uniform == uniform for s in slices for p in s.points):
                handles.append(Line2D([], [], linestyle="none", markersize=5, **LOOKS[uniform]))
                names.append(NAMES[uniform])
        figure.legend(handles, names, loc="outside upper right", ncols=2)
        return svg.finish(figure, prefix, label)


def _slice(axes: Axes, piece: Slice) -> None:
    places: dict[str, int] = {}
    if not piece.numeric:
        for name in sorted({printable(p.x) for p in piece.points}):
            places[name] = len(places)
    for uniform in (False, True):
        members = [p for p in piece.points if p.uniform == uniform]
        xs = [p.x if piece.numeric else places[printable(p.x)] for p in members]
        axes.plot(
            xs,
            [p.value for p in members],
            linestyle="none",
            markersize=4.5,
            alpha=0.85,
            markeredgecolor=svg.SURFACE,
            markeredgewidth=0.5,
            **LOOKS[uniform],
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
    axes.set_xlabel(printable(piece.name), color=svg.INK)
    axes.grid(axis="y")
