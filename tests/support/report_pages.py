"""Pages that several of the report's tests look at, drawn once, and a parser for them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rankalloc.report.writing import write_report
from tests.support import report_odd_samples as odd
from tests.support import report_samples as samples


class Page(HTMLParser):
    """Ids, addresses, tags and the text of each element that matters here."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.addresses, self.tags, self.sections, self.events = [], [], Counter(), [], []
        self.text, self.svgs = [], []
        self.feed(text)

    @property
    def twice(self) -> list[str]:
        """Ids that more than one element has."""
        return [i for i, n in Counter(self.ids).items() if n > 1]

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags[tag] += 1
        self.events += [name for name in values if name.startswith("on")]
        if "id" in values:
            self.ids.append(values["id"])
        self.addresses += [
            v for k, v in attrs if k in ("href", "src", "xlink:href", "action", "srcset", "poster", "data")
        ]
        if tag == "section":
            self.sections.append(values["id"])
        if tag == "svg":
            self.svgs.append(values)

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.text.append(data)


class Drawn(dict):
    """{name of a page: what ``draw`` makes of it}, each drawn when it is first asked for."""

    def __init__(self, draw: Callable[[str], Any]):
        super().__init__()
        self._draw = draw

    def __missing__(self, name: str) -> Any:
        self[name] = self._draw(name)
        return self[name]


@functools.cache
def pages() -> SimpleNamespace:
    """The pages of a sweep (its best trial is ``samples.run()``), of a hostile run and of a comparison, in a folder
    that is removed when the tests end."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sweep = samples.sweep_folder(folder / "sweep")

    def write(name: str) -> Path:
        source = {
            "sweep": lambda: folder / "sweep",
            "hostile": odd.hostile,
            "comparison": lambda: samples.run(blocks=3, target=108),
        }[name]()
        other = samples.run(blocks=3, target=96, seed=3).model_copy(update={"name": "the <other>"})
        return write_report(source, folder / "out" / f"{name}.html", compare=other if name == "comparison" else None)

    paths = Drawn(write)
    parsed = Drawn(lambda name: Page(paths[name].read_text(encoding="utf-8")))
    return SimpleNamespace(folder=folder, paths=paths, pages=parsed, trace=samples.run(), sweep=sweep)
