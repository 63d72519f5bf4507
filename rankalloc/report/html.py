"""The page itself: one HTML file that needs nothing else, and the JSON it came from beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RankallocError
from ..files import write_json, write_text
from ..trace import RankTrace, SweepRecord
from .source import Source, read_source, would_lose

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    source: RankTrace | SweepRecord | str | os.PathLike, output: str | os.PathLike, *, title: str | None = None
) -> Path:
    """Write the rank report of ``source`` to ``output``, and its data as JSON beside it with the same stem.

    Args:
        source: the folder of a run or of a sweep, a ``trace.json``, a ``sweep.json``, the JSON beside
            another report, or a record in memory. The layers of a sweep's page are those of its best
            trial, with the uniform trial beside it where that helps; a sweep record in memory has no
            traces, so its page shows the sweep only.
        output: a path ending in ``.html``. The same source gives the same bytes.
        title: heading of the page; the run's or sweep's name when None.

    Returns:
        The path of the page.

    Raises:
        RankallocError: the source is missing or damaged, ``output`` does not end in ``.html``, its
            JSON would overwrite a file that is no report's data, or the files cannot be written.

    Example:
        >>> write_report("runs/punctuation", "reports/punctuation.html")  # doctest: +SKIP
        PosixPath('reports/punctuation.html')
    """
    output = Path(output)
    if output.suffix != ".html":
        raise RankallocError(
            f"a report is written to a file ending in .html, not to {output}; say {output.name or 'report'}.html"
        )
    if output.is_dir():
        raise RankallocError(f"{output} is a folder; give the name of a file ending in .html")
    beside = output.with_suffix(".json")
    if would_lose(beside):
        raise RankallocError(
            f"the data of {output.name} would be written over {beside}, which is no report's data; choose another name"
        )
    records = read_source(source)
    page = render(records, title=title, data_name=beside.name)
    write_json(beside, records.dump())
    return write_text(output, page)


def environment() -> Environment:
    """The templates, with the filters they use; everything is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from . import wording

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,  # of a section: its end tag follows on the next line
    )
    for name in ("count", "number", "fixed", "rank", "percent", "size", "duration", "moment", "plural", "printable"):
        made.filters[name] = getattr(wording, name)
    made.filters["svg"] = Markup  # applied only to svg.inline's output, which has escaped every name
    made.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    return made


def render(records: Source, *, title: str | None = None, data_name: str = "report.json") -> str:
    """The page as a string. ``data_name`` is the name of the JSON beside it."""
    from markupsafe import Markup

    from . import colours
    from .facts import Subject
    from .sections import SECTIONS

    made = environment()
    page = Subject.of(records)
    sections, drawn = [], 0
    for section in SECTIONS:
        shown = section.show(page)
        if shown is not None:
            figures = list(enumerate(shown.get("figures", ()), drawn + 1))
            drawn += len(figures)
            body = made.get_template(section.template).render(
                **shown | {"figures": figures, "data_name": data_name}
            )
            sections.append((section, Markup(body)))
    light, dark = colours.palette()
    parts = {name: Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js")}
    text = made.get_template("report.html.j2").render(
        title=title or page.record.name, record=page.record, trace=records.trace, sweep=page.sweep, sections=sections,
        light=light, dark=dark, style=parts["report.css"], script=parts["report.js"],
    )
    # Lone surrogates, which a JSON file can smuggle in, have no UTF-8 form.
    return text.rstrip("\n").encode("utf-8", "replace").decode("utf-8")
