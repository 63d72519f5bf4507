"""What identifies a run of any part."""

from __future__ import annotations

from typing import NamedTuple

SPLITS = {"rates": "tune", "seeds": "report"}
"""The split on which a run of each phase is judged."""


class Cell(NamedTuple):
    """What identifies a run: two runs of one cell are the same run.

    Attributes:
        part: "planted", "language" or "punctuation".
        phase: "rates" for runs that choose a rate, "seeds" for those that are compared.
        place: where the arms meet: "main mlp", "half transformer", ...; else the part's name.
    """

    part: str
    phase: str
    place: str
    arm: str
    rate: float
    steps: int
    seed: int
