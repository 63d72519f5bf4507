"""What ``report`` does: read the sources, write the report to a file or to stdout, and the figures to a folder."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from ..errors import ConfigError
from .output import show, show_json


def report_on(
    source: str, output: str | None, title: str | None, compare: str | None, form: str | None, figures: str | None
) -> None:
    """``rankalloc report``: write the report and print its path, or print the report where it goes to stdout. Where
    figures are asked for and neither a file nor a format, they are all that is written."""
    from ..experiments.run_folder import REPORT_NAME
    from ..report import write_report
    from ..report.writing import FORMATS, print_report, write_figures_of

    if form is not None and form not in FORMATS:
        raise ConfigError(f"there is no format {form!r}; a report is written as {', '.join(FORMATS)}")
    if output is None and form is None and figures is not None:
        write_figures_of(source, figures, compare=compare)
        return show(f"wrote the figures to {figures}")
    if output is None and form in ("md", "json"):
        text = print_report(source, form, title=title, compare=compare, figures=figures)
        return show_json(text) if isinstance(text, dict) else typer.echo(text, nl=False)
    if output is None:
        folder = source if Path(source).is_dir() else os.path.dirname(source)
        output = os.path.join(folder, "comparison.html" if compare is not None else REPORT_NAME)
    write_report(source, output, title=title, compare=compare, format=form, figures=figures)
    show(f"wrote {output}")
    if figures is not None:
        show(f"wrote the figures to {figures}")
