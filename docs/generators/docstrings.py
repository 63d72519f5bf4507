"""A griffe extension: what the docstrings of this package have that griffe's Google style does not read by itself."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)Example:[ \t]*$", re.MULTILINE)
LITERAL = re.compile(r"^( *)Example::[ \t]*\n\n((?:\1 +.*\n?|[ \t]*\n)+)", re.MULTILINE)


def readable(text: str) -> str:
    """Sections called Example are examples; an indented block after ``Example::`` is Python."""

    def fenced(match: re.Match[str]) -> str:
        margin, block = match.groups()
        lines = [line[4:] for line in block.rstrip().splitlines()]
        return "\n".join([f"{margin}```python", *lines, f"{margin}```", ""])

    return EXAMPLE.sub(r"\1Examples:", LITERAL.sub(fenced, text))


class Docstrings(griffe.Extension):
    """Applies :func:`readable` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
