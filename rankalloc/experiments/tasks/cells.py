"""What a cell of the user's data holds: numbers, classes and lists as people and their programs write them.

Every function raises a :class:`Mistake`, a sentence without its place; the caller knows the row.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import tokenize
from typing import Any

# A list that is written out as text is parsed up to this many characters: Python's parser is not for more.
_LONGEST_LIST = 1_000_000
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_QUOTED_LIST = re.compile(r"\s*\[[\[\s]*['\"].*\]\s*", re.DOTALL)


class Mistake(ValueError):
    """What is wrong with one row, in a sentence without the row's place."""


def shown(value: Any) -> str:
    """``value`` as a sentence quotes it, short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def text_in(value: Any, column: str) -> str:
    """A cell that should hold text. Raises Mistake."""
    if not isinstance(value, str) or not value.strip():
        hint = "; a list of words is for kind: token-classification" if isinstance(value, list) else ""
        raise Mistake(f"{column!r} should be text, got {shown(value)}{hint}")
    return value


def class_in(value: Any, column: str) -> str:
    """The name of a class: text, or a whole number, also as 1.0 (what a spreadsheet or pandas makes of 1 in a column
    with gaps). Raises Mistake."""
    given = value.strip() if isinstance(value, str) else value
    if isinstance(listed(given), list):
        raise Mistake(
            f"{column!r} should be a class (text or a whole number), got the list {shown(value)}; one label a word is "
            "for kind: token-classification"
        )
    if isinstance(given, str) and _DECIMAL.fullmatch(given):
        given = float(given)
    if isinstance(given, float) and given.is_integer() and abs(given) < 2**53:
        given = int(given)
    if isinstance(given, float) and not math.isnan(given):
        raise Mistake(f"{column!r} should be a class, got {shown(value)}; for numbers use kind: regression")
    if isinstance(given, str) and _DECIMAL_COMMA.fullmatch(given):
        raise Mistake(f"{column!r} should be a class, got {shown(value)}; for numbers use kind: regression")
    absent = isinstance(given, str) and given.lower() in ("", "nan")
    if not isinstance(given, (str, int)) or absent:
        raise Mistake(f"{column!r} should be a class (text or a whole number), got {shown(value)}")
    return str(given)


def number_in(value: Any, column: str, decimal_comma: bool = False) -> float:
    """A finite number. Raises Mistake.

    Args:
        decimal_comma: "1,5" is one and a half (a file whose columns are parted by another sign leaves no doubt).
    """
    given = value.strip() if isinstance(value, str) else value
    if isinstance(given, str) and _DECIMAL_COMMA.fullmatch(given):
        if not decimal_comma:
            raise Mistake(f"{column!r} should be a finite number, got {shown(value)}; write decimals with a point")
        given = given.replace(",", ".")
    try:
        number = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Mistake(f"{column!r} should be a finite number, got {shown(value)}")
    return number


def listed(value: Any) -> Any:
    """A list that is written as text, by JSON, Python or numpy (as pandas does), as a list; anything else as it is.

    Raises:
        Mistake: text looks like a list of quoted words and cannot be read as one.
    """
    if not isinstance(value, str) or not (value.strip().startswith("[") and value.strip().endswith("]")):
        return value
    for read in (json.loads, _python_list):
        try:
            found = read(value.strip()) if len(value) <= _LONGEST_LIST else None
        except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue
        if isinstance(found, list):
            return found
    if _QUOTED_LIST.fullmatch(value):
        raise Mistake(f"{shown(value)} looks like a list and cannot be read as one; store lists as JSON lines")
    return value


def _python_list(text: str) -> Any:
    """What Python reads. numpy leaves the commas between values out, and Python would join words."""
    parts: list[str] = []
    before: tokenize.TokenInfo | None = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _BLANK:
            continue
        if before is not None and _ends_value(before) and _begins_value(token):
            parts.append(",")
        parts.append(token.string)
        before = token
    return ast.literal_eval(" ".join(parts))


_BLANK = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
_NAMES = ("True", "False", "None")


def _ends_value(token: tokenize.TokenInfo) -> bool:
    return token.type in (tokenize.STRING, tokenize.NUMBER) or token.string in ("]", "}", *_NAMES)


def _begins_value(token: tokenize.TokenInfo) -> bool:
    return token.type in (tokenize.STRING, tokenize.NUMBER) or token.string in ("[", "{", *_NAMES)


def words_in(value: Any, column: str) -> list[Any]:
    """A list of words or labels; text is split at blanks, and a list written as text is read. Raises Mistake."""
    found = listed(value)
    if isinstance(found, str):
        found = found.split()
    if not isinstance(found, list) or not found:
        raise Mistake(f"{column!r} should be a list or words with blanks between them, got {shown(value)}")
    return found
