"""Numbers for readers: grouped thousands, real minus signs, units spelled out."""

from __future__ import annotations

import math
import unicodedata
from typing import Literal

MINUS = "\u2212"
ABSENT = "\u2013"


Outcome = Literal["helped", "hurt", "cannot tell"]
"""What adaptive ranks did, in a verdict."""


def count(value: int | None) -> str:
    """``41472`` -> ``41,472``; None -> an en dash."""
    return ABSENT if value is None else f"{value:,d}".replace("-", MINUS)


def number(value: float | int | None, digits: int = 4) -> str:
    """``digits`` significant digits; integers in full; None -> an en dash."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if not math.isfinite(value) or abs(value) >= 1e15:
        return f"{value:.{digits}g}".replace("-", MINUS)
    if abs(value) >= 10**digits:
        return count(round(value))
    text = f"{value:.{digits}g}"
    return text.replace("-", MINUS)


def fixed(value: float | None, places: int = 4, signed: bool = False) -> str:
    """``places`` decimals, with a plus sign when ``signed``; None -> an en dash."""
    if value is None:
        return ABSENT
    text = f"{value:+.{places}f}" if signed else f"{value:.{places}f}"
    return text.replace("-", MINUS)


def signed(value: float, places: int = 0) -> str:
    """A difference with its sign: ``+3``, ``−2``, ``0``."""
    text = f"{value:+,.{places}f}".replace("-", MINUS)
    return text if text.strip("+" + MINUS + "0.,") else "0"


def rate(value: float | None) -> str:
    """A learning rate, which is typed in again: ``0.00125``, with no digit rounded away that a person would give."""
    return ABSENT if value is None else f"{value:g}"


def rank(value: float) -> str:
    """A rank that may be fractional (a mean): ``6``, ``6.4``."""
    return f"{value:.0f}" if abs(value - round(value)) < 0.05 else f"{value:.1f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace("-", MINUS)


def size(value: int | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return ABSENT
    if value < 1024:
        return f"{value} B"
    for unit, scale in (("KiB", 1024), ("MiB", 1024**2), ("GiB", 1024**3)):
        if value < 1024 * scale or unit == "GiB":
            return f"{value / scale:.1f} {unit}"
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    """Seconds in readable units: ``0.31 s``, ``75.2 s``, ``12 min 5 s``, ``3 h 4 min``."""
    if seconds is None:
        return ABSENT
    if seconds < 1:
        return f"{seconds:.3g} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def moment(text: str) -> str:
    """An ISO time as ``2025-03-01 12:00 UTC``; anything else as it is."""
    if len(text) == 25 and text[10] == "T" and text.endswith("+00:00"):
        return f"{text[:10]} {text[11:16]} UTC"
    return text


def plural(n: int, word: str) -> str:
    """``1 layer``, ``36 layers``."""
    return f"{count(n)} {word}" + ("" if n == 1 else "s")


def some(names: list[str], most: int = 6) -> str:
    """The names joined, cut after ``most`` with a count of the rest."""
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def printable(text: object) -> str:
    """``text`` on one line. Control characters, which SVG and HTML cannot hold, and characters that change the
    direction of writing, which can disguise a name, become visible replacements."""
    return "".join(" " if c in "\t\n\r" else "\ufffd" if _unfit(c) else c for c in str(text))


def _unfit(character: str) -> bool:
    turning = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return character in turning or unicodedata.category(character) in ("Cc", "Cs")
