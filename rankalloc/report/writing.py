"""Writing a report: the page for people, Markdown for a pull request, JSON for a script, figures for a paper."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import RankallocError
from ..files import write_json, write_text
from ..records import read_json
from .facts import Subject
from .html import exhibits_of, render
from .kinds import Source
from .markdown import render_markdown
from .source import Given, read_source, would_lose
from .summary import SCHEMA, summary

Format = Literal["html", "md", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)


def write_report(
    source: Given,
    output: str | os.PathLike,
    *,
    title: str | None = None,
    compare: Given | None = None,
    format: Format | None = None,
    figures: str | os.PathLike | None = None,
) -> Path:
    """Write the rank report of ``source`` to ``output``. A page has its data as JSON beside it, with the same stem.

    Args:
        source: the folder of a run, of a sweep or of ``rankalloc shrink`` or ``frontier``; a ``trace.json``,
            ``sweep.json`` or the like; the output of ``rankalloc check --json``; the JSON beside another report; or a
            record in memory. The layers of a sweep's page are those of its best trial, with the uniform trial beside
            it where that helps; a sweep record in memory has no traces, so its page shows the sweep only.
        output: the file to write. The same source gives the same bytes.
        title: heading of the report; the record's name when None.
        compare: a second source, of whatever kind: where the ranks differ, how far they agree, and what else differs.
        format: "html" (one page that needs nothing else), "md" (short, for a pull request) or "json" (for scripts;
            :mod:`rankalloc.report.summary`). None goes by the ending of ``output``.
        figures: a folder for every figure as PDF, SVG and PNG, in the width of one column and of two.

    Returns:
        The path of the report.

    Raises:
        RankallocError: a source is missing or damaged, ``output`` has an ending that is none of these, a file would be
            overwritten that is no report's, or the files cannot be written.

    Example:
        >>> write_report("runs/punctuation", "reports/punctuation.html")  # doctest: +SKIP
        PosixPath('reports/punctuation.html')
        >>> write_report("runs/a", "a-b.md", compare="runs/b")  # doctest: +SKIP
        PosixPath('a-b.md')
    """
    output = Path(output)
    form = format_of(output, format)
    beside = output.with_suffix(".json") if form == "html" else None
    _refuse_loss(output, form, beside)
    records = read_source(source, compare)
    text = _short(records, form, title) if beside is None else render(records, title=title, data_name=beside.name)
    _figures(records, figures)
    if beside is not None:
        write_json(beside, records.dump())
    return write_json(output, text) if isinstance(text, dict) else write_text(output, text)


def print_report(
    source: Given,
    format: Format,
    *,
    title: str | None = None,
    compare: Given | None = None,
    figures: str | os.PathLike | None = None,
) -> str | dict[str, Any]:
    """The report as Markdown, or for "json" as plain values, as :func:`write_report` would write it."""
    records = read_source(source, compare)
    text = _short(records, format, title)
    _figures(records, figures)
    return text


def write_figures_of(source: Given, folder: str | os.PathLike, *, compare: Given | None = None) -> None:
    """Write the figures of a report, and no report: as PDF, SVG and PNG, in the width of one column and of two."""
    _figures(read_source(source, compare), folder)


def _short(records: Source, form: Format, title: str | None) -> str | dict[str, Any]:
    page = Subject.of(records)
    return summary(page, title) if form == "json" else render_markdown(page, title)


def _figures(records: Source, folder: str | os.PathLike | None) -> None:
    if folder is not None:
        from .paper import write_figures

        write_figures(exhibits_of(Subject.of(records)), folder)


def format_of(output: Path, format: str | None) -> Format:
    """The format that was asked for, else that of the file's ending.

    Raises:
        RankallocError: neither names one, or they contradict each other.
    """
    ending = output.suffix.removeprefix(".")
    for form in FORMATS:
        if form == (format or ending):
            if form != ending and ending in FORMATS:
                raise RankallocError(f"{output} ends in .{ending}, and the format is {form}; name it .{form}")
            if form != ending:
                raise RankallocError(f"a report as {form} is written to a file ending in .{form}, not to {output}")
            return form
    if format is not None:
        raise RankallocError(f"there is no format {format!r}; a report is written as {', '.join(FORMATS)}")
    raise RankallocError(
        f"a report is written to a file ending in .html, .md or .json, not to {output}; "
        f"say {output.name or 'report'}.html"
    )


def _refuse_loss(output: Path, form: Format, beside: Path | None) -> None:
    """Refuse to write over what is no report's.

    Raises:
        RankallocError: ``output`` is a folder, or a file is there that another command wrote.
    """
    if output.is_dir():
        raise RankallocError(f"{output} is a folder; give the name of a file ending in .{form}")
    if beside is not None and would_lose(beside):
        raise RankallocError(
            f"the data of {output.name} would be written over {beside}, which is no report's data; choose another name"
        )
    if form == "json" and output.exists() and not _is_summary(output):
        raise RankallocError(f"{output} is there and is no report; choose another name")


def _is_summary(path: Path) -> bool:
    try:
        data = read_json(path, "report")
    except RankallocError:
        return False
    return isinstance(data, dict) and data.get("schema") == SCHEMA
