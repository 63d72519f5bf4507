"""Numbers as a document writes them: where they are, and whether a computed value is written like that.

In digits: signs (+ and −), thousands separators, decimals, fractions (1/8), exponents (1e-3). In words: two to twelve,
twice, half and fractions such as "two thirds". "One" is as often an article as a number, and does not count.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

_COUNTS = {
    "two": 2, "twice": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "eleven": 11, "twelve": 12,
}  # fmt: skip
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10, "twentieth": 20}
_DIGITS = r"(?<![\w.,/-])[+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+|e-?\d+)?(?!\w)"
_WORDS = rf"\b(?:(?:{'|'.join(_COUNTS)})\s(?:{'|'.join(_PARTS)})s\b|(?:{'|'.join([*_COUNTS, *_PARTS])})\b)"
NUMBER = re.compile(f"{_DIGITS}|{_WORDS}", re.IGNORECASE)
UNREAD = re.compile(r"```.*?^```|<!--.*?-->|`[^`]*`|(?<=\])\([^)]*\)", re.DOTALL | re.MULTILINE)
"""Code, comments and the targets of links, in which no number is one of the text."""
NEAR = 0.05
"""How far a share may be from the fraction in words that stands for it: 0.51 is half, 0.68 is two thirds."""


class Number(NamedTuple):
    """A number and the places between which it is written."""

    text: str
    start: int
    end: int


@functools.cache
def numbers_of(text: str) -> list[Number]:
    """Every number of a text in Markdown, in order."""
    read = UNREAD.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    return [Number(found[0], *found.span()) for found in NUMBER.finditer(read)]


@functools.cache
def spans_of(words: str, text: str) -> list[tuple[int, int]]:
    """Where the words stand in a text, however its lines are broken."""
    pattern = r"\s+".join(re.escape(word) for word in words.split())
    return [found.span() for found in re.finditer(pattern, text)]


def is_written(value: float, text: str) -> bool:
    """Whether a value is written so: rounded to as many digits, with its sign; a fraction in words is near it."""
    words = text.lower().split()
    if words[-1] in _COUNTS:
        return round(value) == _COUNTS[words[-1]]
    if words[-1].removesuffix("s") in _PARTS:
        times = _COUNTS[words[0]] if len(words) == 2 else 1
        return abs(value - times / _PARTS[words[-1].removesuffix("s")]) <= NEAR
    if "/" in text:
        above, below = text.split("/")
        return value == int(above) / int(below)
    if "e" in text:
        return value == float(text)
    decimals = len(text.partition(".")[2])
    shown = f"{value:{'+' if text[0] in '+−' else ''}{',' if ',' in text else ''}.{decimals}f}".replace("-", "−")
    if text[0] not in "+−" and not shown.strip("−0."):
        shown = shown.lstrip("−")  # no sign, and nothing left of the value: 0.0
    return shown == text
