"""The templates of pages, and the filters they use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


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
    for name in ("count", "number", "fixed", "rank", "percent", "size", "duration", "moment", "plural", "printable",
                 "signed"):
        made.filters[name] = getattr(wording, name)
    made.filters["zip"] = lambda one, other: list(zip(one, other, strict=True))
    made.filters["svg"] = Markup  # applied only to svg.inline's output, which has escaped every name
    made.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    return made
