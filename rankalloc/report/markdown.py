"""A report for a pull request: verdict, a short table, and the ranks of the layers folded away.

Names are code, so that neither Markdown nor HTML in them does anything and no one is mentioned.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .wording import count, fixed, number, percent, printable, signed

if TYPE_CHECKING:
    from .facts import Subject


def render_markdown(page: Subject, title: str | None = None) -> str:
    """The report as GitHub's Markdown, ending with one newline."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from .summary import summary
    from .templating import TEMPLATES

    # Markdown, not HTML: every text goes through plain or code
    made = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=False,
    )  # fmt: skip
    made.filters |= {
        "plain": plain, "code": code, "block": block, "count": count, "number": number, "fixed": fixed,
        "percent": percent, "signed": signed,
    }
    text = made.get_template("report.md.j2").render(
        r=summary(page, title), facts=_facts(page), tables=_tables(page)
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text).strip().encode("utf-8", "replace").decode("utf-8") + "\n"


def plain(text: object) -> str:
    """Text whose characters mean themselves in Markdown, also inside a table."""
    escaped = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", escaped)
    return re.sub(r"@(?=\w)", "@\u200b", escaped)  # nobody is called to a pull request by a report


def code(text: object) -> str:
    """Text as a code span, also inside a table."""
    shown = printable(text).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown[:1] in ("`", "") or shown[-1:] in ("`", " ") else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def block(text: object) -> str:
    """Lines as a fenced block, whose fence is longer than any in them."""
    lines = [printable(line) for line in str(text).split("\n")]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", str(text))), default=0))
    return "\n".join([f"{fence}sh", *lines, fence])


def _tables(page: Subject) -> list[tuple[list[str], list[list[str]]]]:
    """(header, rows) of the tables that a page of its kind is about: an audit's differences, frontiers' points."""
    if page.comparison is not None:
        return []
    if "audit" in page.parts:
        from .audited import audit_of
        from .sections_audit import difference_rows

        header, rows = difference_rows(audit_of(page.parts))
        return [(header, rows)] if rows else []
    if "frontier" in page.parts:
        from .sections_finished import frontier_rows

        return [frontier_rows(page)]
    return []


def _facts(page: Subject) -> list[tuple[str, Any]]:
    """The rows of the short table of one run."""
    if page.run is None or page.comparison is not None:
        return []
    trace = page.run.trace
    budget = trace.budget
    ranks = trace.final_ranks
    spent = trace.allocations[-1].reached if trace.allocations else budget.initial
    rows = [
        ("method", code(trace.method)),
        ("model", code(trace.model or "not recorded")),
        ("budget", f"{count(spent)} of {count(budget.target)} {budget.unit}"),
        ("adapter parameters", f"{count(trace.adapter_params_final)} (from {count(trace.adapter_params_initial)})"),
        ("ranks", f"{min(ranks, default=0)} to {max(ranks, default=0)} in {count(len(ranks))} layers"),
    ]
    for row in page.run.evaluations:
        metrics = ", ".join(f"{plain(name)} {number(value)}" for name, value in row.metrics.items())
        rows.append((f"{plain(row.split)} ({count(row.examples)} examples)", metrics))
    return rows
