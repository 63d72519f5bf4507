"""The page of a finished adapter that was checked: what it holds, what less would keep, who reads it right."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ..errors import RankallocError
from ..files import write_text
from . import colours, figures_map, grids, svg
from .exhibit import Exhibit
from .exhibits import map_header
from .wording import count, percent

_Layer = Mapping[str, Any]


class _Place(NamedTuple):
    name: str
    block: int | None
    role: str


def write_check(record: Mapping[str, Any], output: str | os.PathLike) -> Path:
    """Write the page of :meth:`rankalloc.posthoc.checking.Check.record`: one file that needs nothing else.

    Raises:
        RankallocError: ``output`` does not end in ``.html``, or cannot be written.
    """
    output = Path(output)
    if output.suffix != ".html" or output.is_dir():
        raise RankallocError(f"the page is written to a file ending in .html, not to {output}")
    return write_text(output, render_check(record))


def render_check(record: Mapping[str, Any]) -> str:
    """The page as a string."""
    from markupsafe import Markup

    from .templating import TEMPLATES, environment

    light, dark = colours.palette()
    parts = {name: Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js")}
    shown = [*_curve(record), *_maps(record["layers"])]
    text = environment().get_template("check.html.j2").render(
        record=record, name=Path(record["path"]).name or record["path"], figures=list(enumerate(shown, 1)), light=light,
        dark=dark, style=parts["report.css"], script=parts["report.js"], gone=record["stored"] - record["params"],
    )
    return text.rstrip("\n").encode("utf-8", "replace").decode("utf-8")


def _curve(record: Mapping[str, Any]) -> list[Exhibit]:
    points = [(cost, kept) for cost, kept in record["curve"] if cost]
    if len(points) < 2:
        return []
    stored = record["stored"]
    rows = [[count(cost), percent(cost / stored), f"{kept:.4f}", f"{(max(0, 1 - kept**2)) ** 0.5:.4f}"]
            for cost, kept in points]

    def draw() -> Figure:
        figure = svg.canvas(3.3)
        axes = figure.add_subplot()
        axes.plot([0, *(cost for cost, _ in points)], [0, *(kept for _, kept in points)], color=colours.ADAPTIVE,
                  linewidth=1.8)
        axes.axvline(stored, color=colours.UNIFORM, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.text(stored, 0.04, "the file now ", ha="right", color=colours.UNIFORM, size=8.5)
        for share, params in record["keeping"].items():
            axes.plot([params], [float(share)], marker="o", color=colours.ADAPTIVE, markersize=4)
            axes.text(params, float(share) - 0.035, f"  {float(share):.0%} at {count(params)}", va="top", size=8.5,
                      color=colours.MUTED)
        axes.set(xlim=(0, stored * 1.02), ylim=(0, 1.03), xlabel="parameters kept", ylabel="share of ‖ΔW‖ kept")
        svg.whole(axes.xaxis)
        return figure

    return [Exhibit(
        "curve", "What less would keep", draw,
        "Singular directions of all layers, the largest σ² per parameter first, as rankalloc shrink chooses them. "
        "This is about weights and not about quality.",
        ["parameters", "of now", "share of ‖ΔW‖ kept", "relative error"], rows, names=0,
    )]


def _maps(layers: Sequence[_Layer]) -> list[Exhibit]:
    found = []
    placed = [_Place(layer["name"], layer["block"], layer["role"]) for layer in layers]
    for key, what, title, caption in (
        ("ranks", "used", "Ranks that are used",
         "Singular values that are more than rounding, by kind of layer and block; a dashed cell is 0."),
        ("effective", "effective", "Effective rank",
         "exp of the entropy of σ / Σσ, rounded: how many directions carry a layer's update."),
    ):
        grid = grids.grid(grids.groups(placed), [round(layer[what]) for layer in layers])
        rows = [[role, *("–" if cell is None else str(cell) for cell in cells), f"{mean:.1f}"]
                for role, cells, mean in zip(grid.roles, grid.cells, grid.row_means, strict=True)]
        draw = partial(figures_map.rank_map_figure, grid)
        found.append(Exhibit(key, title, draw, caption, map_header(grid, "kind"), rows))
    return found
