"""The page of a finished adapter that was checked: what it holds, what less would keep, who reads it right."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RankallocError
from ..files import write_text
from . import figures, svg, tables
from .exhibits import Exhibit, exhibit
from .wording import count, percent

_Layer = Mapping[str, Any]


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

    from .html import TEMPLATES, environment

    light, dark = svg.palette()
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

    def draw(prefix: str, label: str) -> str:
        with svg.drawing():
            figure = svg.canvas(3.3)
            axes = figure.add_subplot()
            axes.plot([0, *(cost for cost, _ in points)], [0, *(kept for _, kept in points)], color=svg.ADAPTIVE,
                      linewidth=1.8)
            axes.axvline(stored, color=svg.UNIFORM, linewidth=1.2, linestyle=(0, (4, 2)))
            axes.text(stored, 0.04, "the file now ", ha="right", color=svg.UNIFORM, size=8.5)
            for share, params in record["keeping"].items():
                axes.plot([params], [float(share)], marker="o", color=svg.ADAPTIVE, markersize=4)
                axes.text(params, float(share) - 0.035, f"  {float(share):.0%} at {count(params)}", va="top", size=8.5,
                          color=svg.MUTED)
            axes.set(xlim=(0, stored * 1.02), ylim=(0, 1.03), xlabel="parameters kept", ylabel="share of ‖ΔW‖ kept")
            svg.whole(axes.xaxis)
            return svg.finish(figure, prefix, label)

    return [exhibit(
        "curve", "What less would keep", draw,
        "Singular directions of all layers, the largest σ² per parameter first, as rankalloc shrink chooses them. "
        "This is about weights and not about quality.",
        ["parameters", "of now", "share of ‖ΔW‖ kept", "relative error"], rows, names=0,
    )]


def _maps(layers: Sequence[_Layer]) -> list[Exhibit]:
    found = []
    for key, what, title, caption in (
        ("ranks", "used", "Ranks that are used",
         "Singular values that are more than rounding, by kind of layer and block; a dashed cell is 0."),
        ("effective", "effective", "Effective rank",
         "exp of the entropy of σ / Σσ, rounded: how many directions carry a layer's update."),
    ):
        grid = _grid(layers, what)
        rows = [[role, *("–" if cell is None else str(cell) for cell in cells), f"{mean:.1f}"]
                for role, cells, mean in zip(grid.roles, grid.cells, grid.row_means, strict=True)]
        names = [c if c == tables.OUTSIDE else f"block {c}" for c in grid.columns]

        def draw(prefix: str, label: str, grid: tables.RankMap = grid) -> str:
            return figures.rank_map_figure(grid, prefix, label)

        found.append(exhibit(key, title, draw, caption, ["kind", *names, "mean"], rows))
    return found


def _grid(layers: Sequence[_Layer], what: str) -> tables.RankMap:
    blocks = sorted({layer["block"] for layer in layers if layer["block"] is not None})
    outside = any(layer["block"] is None for layer in layers)
    keys: list[int | None] = [*blocks, *([None] if outside else [])]
    roles = list(dict.fromkeys(layer["role"] for layer in layers))
    at = {(layer["role"], layer["block"]): round(layer[what]) for layer in layers}
    cells = [[at.get((role, key)) for key in keys] for role in roles]
    return tables.RankMap(
        roles=roles, columns=[tables.OUTSIDE if key is None else str(key) for key in keys], cells=cells,
        outside=outside, row_means=[_mean(row) for row in cells],
        column_means=[_mean(column) for column in zip(*cells, strict=True)],
    )


def _mean(values: Sequence[int | None]) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else 0.0
