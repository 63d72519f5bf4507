"""Layers named by patterns, as PEFT's ``rank_pattern`` names them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError, unknown


def matched(option: str, pattern: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """{layer name: value of the first key that matches it}. A key is a regular expression for the whole name, or for
    its end after a dot.

    Raises:
        ConfigError: the pattern is not a mapping, or a key is not a regular expression or matches no layer.
    """
    if not isinstance(pattern, Mapping):
        raise ConfigError(f"{option} must be a mapping of layer names or endings to values, got {pattern!r}")
    found: dict[str, Any] = {}
    for key, value in pattern.items():
        try:
            matches = [name for name in names if re.match(rf"(.*\.)?({key})$", name)]
        except re.error as error:
            raise ConfigError(f"{option}: {key!r} is not a valid regular expression: {error}") from None
        if not matches:
            endings = dict.fromkeys(part for name in names for part in (name.rsplit(".", 1)[-1], name))
            raise ConfigError(f"{option}: " + unknown("layer", key, endings))
        for name in matches:
            found.setdefault(name, value)
    return found
