"""Checks of option values, which come from Python, YAML files and the command line.

Every check returns the value as a plain Python object, so that numpy's numbers are accepted and can be written to JSON.
All raise ``error`` (ConfigError) with the option's name, what it takes, and the value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, Literal

from .errors import ConfigError, RankallocError, unknown

Ends = bool | Literal["low", "high"]


def number(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, ends: Ends = True,
    error: type[RankallocError] = ConfigError,
) -> float:
    """``value`` as a finite float between ``low`` and ``high``.

    ``ends`` says which of the two are allowed themselves: both (True), neither (False), or the one named.

    Example:
        >>> number("dropout", 0, 0, 1, ends="low")
        0.0
        >>> number("dropout", 1, 0, 1, ends="low")
        Traceback (most recent call last):
        rankalloc.errors.ConfigError: dropout must be a number of at least 0 and below 1, got 1
    """
    with_low, with_high = ends in (True, "low"), ends in (True, "high")
    finite = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    above = finite and (value >= low if with_low else value > low)
    if not above or not (value <= high if with_high else value < high):
        bounds = f"of at least {low:g}" if with_low else f"above {low:g}"
        if math.isfinite(high):
            bounds += f" and at most {high:g}" if with_high else f" and below {high:g}"
        raise error(f"{name} must be a number {bounds}, got {value!r}")
    return float(value)


def integer(
    name: str, value: Any, low: int, high: int | None = None, error: type[RankallocError] = ConfigError
) -> int:
    """``value`` as an int from ``low`` to ``high``, both included; True, 8.0 and "8" are not whole numbers.

    Example:
        >>> integer("rank", True, 1)
        Traceback (most recent call last):
        rankalloc.errors.ConfigError: rank must be a whole number of at least 1, got True
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise error(f"{name} must be a whole number {bounds}, got {value!r}")
    return int(value)


def flag(name: str, value: Any, error: type[RankallocError] = ConfigError) -> bool:
    """``value``, which must be True or False: the word "no" would count as true."""
    if not isinstance(value, bool):
        raise error(f"{name} must be true or false, got {value!r}")
    return value


def choice(name: str, value: Any, choices: Iterable[str], error: type[RankallocError] = ConfigError) -> str:
    """``value``, which must be one of ``choices``; the message names the nearest and all of them."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise error(unknown(name, value, choices))
    return value
