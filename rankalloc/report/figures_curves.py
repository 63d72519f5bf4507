"""The figure of what the training loop logged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import colours, svg
from .curves import Panel
from .tables import thin
from .wording import count, number, printable

MOST_TIPS = 30  # points of a curve that tell their values


def curves_figure(panels: list[Panel], others: list[Panel], other: str) -> Figure:
    """Logged values over steps, a panel a quantity; ``others`` are the control's, drawn dashed."""
    columns = min(2, len(panels), svg.medium().panels)
    lines = math.ceil(len(panels) / columns)
    beside = {panel.title: panel for panel in others}
    figure = svg.canvas(2.2 * lines + 0.25, wspace=0.07)
    grid = figure.subplots(lines, columns, squeeze=False)
    for k, axes in enumerate(grid.flat):
        if k >= len(panels):
            axes.set_visible(False)
            continue
        taken: dict[str, str] = {}
        for name, steps, values in panels[k].series:
            taken[name] = colours.LINES[len(taken) % len(colours.LINES)]
            _curve(axes, steps, values, taken[name], "-", name)
        for name, steps, values in beside[panels[k].title].series if panels[k].title in beside else []:
            _curve(axes, steps, values, taken.get(name, colours.MUTED), (0, (3, 2)), f"{name} ({other})")
        svg.tips(axes, _values(panels[k], ""))
        if panels[k].title in beside:
            svg.tips(axes, _values(beside[panels[k].title], f" ({other})"))
        axes.set_title(printable(panels[k].title))
        axes.set_xlim(left=0)
        svg.whole(axes.xaxis)
        axes.grid(axis="y")
        if k + columns >= len(panels):
            axes.set_xlabel("optimizer step")
        names = axes.get_legend_handles_labels()[1]
        svg.key(axes, 1 if max(map(len, names)) > 24 else 2 if sum(map(len, names)) > 30 else 4)
    return figure


def _values(panel: Panel, whose: str) -> Iterator[tuple[float, float, str]]:
    """Points of the curves, thinned, with what is told of each."""
    for name, steps, values in panel.series:
        for k in thin(len(steps), MOST_TIPS):
            yield steps[k], values[k], f"{name}{whose}, step {count(steps[k])}: {number(values[k])}"


def _curve(axes: Axes, steps: list[int], values: list[float], colour: str, style: Any, name: str) -> None:
    few = len(steps) <= 30
    text = printable(name) if len(name) <= 40 else printable(name)[:39] + "…"
    (line,) = axes.plot(
        steps, values, color=colour, linestyle=style, linewidth=1.2, marker="o" if few else None, markersize=3
    )
    # matplotlib leaves a label that starts with an underscore out of the legend.
    line.set_label("\u200b" + text if text.startswith("_") else text)
