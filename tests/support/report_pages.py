"""Pages that several of the report's tests look at, drawn once, and a parser for them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

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


@functools.cache
def pages() -> SimpleNamespace:
    """The pages of a sweep (its best trial is ``samples.run()``), of a hostile run and of a comparison, in a folder
    that is removed when the tests end."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sweep = samples.sweep_folder(folder / "sweep")
    paths = {
        "sweep": write_report(folder / "sweep", folder / "out" / "sweep.html"),
        "hostile": write_report(odd.hostile(), folder / "out" / "hostile.html"),
        "comparison": write_report(
            samples.run(blocks=3, target=108), folder / "out" / "comparison.html",
            compare=samples.run(blocks=3, target=96, seed=3).model_copy(update={"name": "the <other>"}),
        ),
    }
    parsed = {name: Page(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    return SimpleNamespace(folder=folder, paths=paths, pages=parsed, trace=samples.run(), sweep=sweep)
