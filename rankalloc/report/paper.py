"""Figures for papers: each figure of a report as PDF, SVG and PNG, in the width of one column and of two.

Text is 8 to 9 points on paper, PDFs embed TrueType fonts (type 42, which journals ask for), SVGs draw their letters as
outlines, and nothing in a file depends on when it was written.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RankallocError
from ..files import replacing
from . import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .exhibit import Exhibit

COLUMNS = {"single": svg.Medium(3.25, 8, 1, 0.75), "double": svg.Medium(6.75, 8, 3, 0.85)}
"""{end of the file's name: what it is drawn for}."""
FORMATS = ("pdf", "svg", "png")
DPI = 300


def write_figures(shown: list[Exhibit], folder: str | os.PathLike) -> list[Path]:
    """Write ``KEY-single`` and ``KEY-double`` of each figure, in every format; returns the paths.

    The names are those of the figures, never of layers. Every figure is drawn before the first file is written.

    Raises:
        RankallocError: there is nothing to draw, or the folder cannot be written to.
    """
    folder = Path(folder)
    if folder.is_file():
        raise RankallocError(f"{folder} is a file; give --figures a folder")
    if not shown:
        raise RankallocError("this report has no figures to write")
    drawn: dict[str, bytes] = {}
    for item in shown:
        for end, medium in COLUMNS.items():
            with svg.drawing(medium):
                figure = item.draw()
                figure.draw_without_rendering()
                figure.set_layout_engine("none")  # laid out once, and not again for every format
                for form in FORMATS:
                    drawn[f"{item.key}-{end}.{form}"] = _content(figure, form)
    paths = []
    for name, content in drawn.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
        paths.append(folder / name)
    return paths


def _content(figure: Figure, form: str) -> bytes:
    if form == "png":
        return svg.png(figure, DPI)
    metadata: dict[str, Any] = {"Date": None, "Creator": None} if form == "svg" else {"CreationDate": None}
    out = io.BytesIO()
    figure.savefig(out, format=form, metadata=metadata)
    return out.getvalue()
