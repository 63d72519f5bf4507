"""Values of options, checked in one way: they come from Python, YAML files and the command line alike."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from .errors import ConfigError


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf, ends: bool = True) -> float:
    """``value`` as a finite float between ``low`` and ``high``, these included if ``ends``.

    Raises ConfigError with the option's name and the value got.
    """
    plain = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not plain or not (low <= value <= high if ends else low < value < high):
        least = f"of at least {low:g}" if ends else f"above {low:g}"
        most = f" and at most {high:g}" if ends else f" and below {high:g}"
        bounds = least + (most if math.isfinite(high) else "")
        raise ConfigError(f"{name} must be a number {bounds}, got {value!r}")
    return float(value)


def whole(name: str, value: Any, low: int) -> int:
    """``value`` as a whole number of at least ``low``. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be a whole number of at least {low}, got {value!r}")
    return value


def flag(name: str, value: Any) -> bool:
    """``value``, which must be True or False: the word "no" would count as true. Raises ConfigError."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}")
    return value
