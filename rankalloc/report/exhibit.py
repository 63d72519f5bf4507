"""A figure with its title, caption, spoken label and the numbers it is drawn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from matplotlib.figure import Figure

from . import svg


@dataclass(frozen=True)
class Exhibit:
    """``key`` is unique on a page and names the figure's files. ``draw`` draws it for :func:`.svg.medium`. ``rows``
    hold ready text, and their cells after the first ``names`` columns are numbers; ``note`` says which are left out.
    ``cells`` names the table of :mod:`.data` whose rows the drawing's cells are, and ``timed`` whether they change with
    the step."""

    key: str
    title: str
    draw: Callable[[], Figure]
    caption: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    names: int = 1
    cells: str = ""
    timed: bool = False

    @cached_property
    def svg(self) -> str:
        """The drawing for a page, whose spoken label is title and caption."""
        with svg.drawing():
            return svg.inline(self.draw(), f"f-{self.key}", f"{self.title}. {self.caption}")
