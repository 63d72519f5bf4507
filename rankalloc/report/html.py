"""The page itself: one HTML file that needs nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .finished import CheckRecord
from .kinds import Source
from .templating import TEMPLATES, environment
from .wording import printable

if TYPE_CHECKING:
    from .exhibit import Exhibit
    from .facts import Subject
    from .section import Section, Shown

KICKERS = {
    "comparison": "Comparison", "sweep": "Rank report · Sweep", "run": "Rank report · Run",
    "cut": "Adapter after a cut", "frontier": "Adapter at several budgets", "audit": "Audit",
}


def sections_of(page: Subject) -> list[tuple[Section, Shown]]:
    """The sections that have a place on the page, with what they show."""
    from .sections import SECTIONS
    from .sections_audit import AUDIT_SECTIONS
    from .sections_compare import COMPARE_SECTIONS
    from .sections_finished import FINISHED_SECTIONS

    found: tuple[Section, ...] = SECTIONS
    if page.comparison is not None:
        found = COMPARE_SECTIONS
    elif page.parts:
        found = AUDIT_SECTIONS if "audit" in page.parts else FINISHED_SECTIONS
    shown = ((section, section.show(page)) for section in found)
    return [(section, one) for section, one in shown if one is not None]


def exhibits_of(page: Subject) -> list[Exhibit]:
    """Every figure of the page, in order."""
    return [item for _, shown in sections_of(page) for item in shown.get("figures", ())]


def render(records: Source, *, title: str | None = None, data_name: str = "report.json") -> str:
    """The page as a string. ``data_name`` is the name of the JSON beside it."""
    from markupsafe import Markup

    from . import colours
    from .checked import render_check
    from .data import block
    from .facts import Subject
    from .summary import verdict_of

    page = Subject.of(records)
    if page.kind == "check":
        return render_check(CheckRecord.model_validate(page.parts["check"]).model_dump())  # shares are numbers again
    made = environment()
    sections, drawn = [], 0
    for section, shown in sections_of(page):
        figures = list(enumerate(shown.get("figures", ()), drawn + 1))
        drawn += len(figures)
        body = made.get_template(section.template).render(**shown | {"figures": figures, "data_name": data_name})
        sections.append((section, Markup(body)))
    light, dark = colours.palette()
    parts = {name: Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js")}
    text = made.get_template("report.html.j2").render(
        title=title or page.name, page=page, sections=sections, light=light, dark=dark, kicker=KICKERS[page.kind],
        style=parts["report.css"], script=parts["report.js"], data=Markup(block(page)),
        description=printable(verdict_of(page).sentence),
    )
    # Lone surrogates, which a JSON file can smuggle in, have no UTF-8 form.
    return text.rstrip("\n").encode("utf-8", "replace").decode("utf-8")
