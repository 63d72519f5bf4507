"""Docstrings on their way into the site: an extension of griffe, which mkdocstrings reads the package with."""

from __future__ import annotations

from typing import Any

import griffe

# docs/hooks.py has imported this package by the time that griffe loads the extension
from generators.docstrings import readable


class Docstrings(griffe.Extension):
    """Applies :func:`readable` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
