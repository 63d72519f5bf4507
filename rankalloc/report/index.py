"""The list of a folder's reports: one page that links each of them, with its first sentence.

``python -m rankalloc.report.index reports`` writes ``reports/index.html``. Title and sentence are read from the pages
themselves, so that any page with a title and a description can stand beside them.
"""

from __future__ import annotations

import os
import sys
from html.parser import HTMLParser
from pathlib import Path

from ..errors import RankallocError
from ..files import write_text
from .templating import TEMPLATES, environment

INDEX_NAME = "index.html"


class _Head(HTMLParser):
    """The title and the description of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.title, self.description, self._inside = "", "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "meta" and values.get("name") == "description":
            self.description = values.get("content") or ""
        self._inside = tag == "title" and not self.title

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.title += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


def write_index(folder: str | os.PathLike) -> Path:
    """Write ``index.html`` into ``folder``, with one line for each other page in it, by name.

    Raises:
        RankallocError: there is no page, or the file cannot be written.
    """
    from markupsafe import Markup

    from . import colours

    folder = Path(folder)
    pages = sorted(path for path in folder.glob("*.html") if path.name != INDEX_NAME)
    if not pages:
        raise RankallocError(f"no report in {folder}; rankalloc report writes one")
    rows = [(path.name, _Head(path.read_text(encoding="utf-8"))) for path in pages]
    light, dark = colours.palette()
    text = environment().get_template("index.html.j2").render(
        rows=rows, light=light, dark=dark,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
    )  # fmt: skip
    return write_text(folder / INDEX_NAME, text.rstrip("\n") + "\n")


if __name__ == "__main__":
    print(write_index(sys.argv[1]))
