"""What a section of a page is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .facts import Subject

Shown = dict[str, Any]
"""The variables of a section's template. Under "figures" are its exhibits; the page numbers them."""


@dataclass(frozen=True)
class Section:
    """``key`` is the section's id, ``template`` a file in ``templates/``; ``show`` returns None when the section has
    no place on this page."""

    key: str
    title: str
    template: str
    show: Callable[[Subject], Shown | None]
