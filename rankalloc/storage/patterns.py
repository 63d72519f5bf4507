"""PEFT's patterns of names, matched so that no file can make the reader work for ever.

PEFT takes a key of rank_pattern or alpha_pattern for a regular expression. One with repeats inside repeats takes a time
that doubles with every letter of a name, so what may do that is refused instead of tried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

MOST_REPEATS = 3
"""Repeats without an end that a pattern may have; the time to match grows by a power of them."""

_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, getattr(_constants, "POSSESSIVE_REPEAT", None))


def by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key that matches ``name`` or its end, as PEFT looks it up.

    Raises:
        ValueError: a key is no regular expression, or one that may take for ever.
    """
    for key, value in (pattern or {}).items():
        if _compiled(key).match(name):
            return value
    return default


@lru_cache(maxsize=4096)
def _compiled(key: str) -> re.Pattern[str]:
    if len(key) > 2000:
        raise ValueError(f"a pattern of {len(key)} characters")
    try:
        parsed = _parser.parse(key)
        if _endless(parsed, 0) > MOST_REPEATS:
            raise ValueError(f"the pattern {key[:60]!r} has too many repeats, and may take for ever to match")
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"the pattern {key[:60]!r} is no regular expression ({error})") from None


def _chooses(parsed: Any) -> bool:
    """Whether a parsed pattern has alternatives."""
    return any(
        operation is _constants.BRANCH or operation is _constants.SUBPATTERN and _chooses(argument[-1])
        for operation, argument in parsed
    )


def _endless(parsed: Any, inside: int) -> int:
    """How many long repeats a parsed pattern has; one inside another counts as too many."""
    found = 0
    for operation, argument in parsed:
        if operation in _REPEATS:
            _, most, body = argument
            long = most > 16
            if long and (inside or _chooses(body)):
                return MOST_REPEATS + 1
            found += int(long) + _endless(body, inside + int(most > 1))
        elif operation is _constants.SUBPATTERN:
            found += _endless(argument[-1], inside)
        elif operation is _constants.BRANCH:
            found += sum(_endless(part, inside) for part in argument[1])
        elif operation in (_constants.ASSERT, _constants.ASSERT_NOT):
            found += _endless(argument[1], inside)
        elif operation in (_constants.GROUPREF, _constants.GROUPREF_EXISTS):
            return MOST_REPEATS + 1
    return found
