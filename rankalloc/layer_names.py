"""What a layer's name tells: its position in the network (the two axes of the rank map), and its place in a list."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

_BLOCK = re.compile(r"^(?:(?P<stack>.*?)\.)?(?P<block>\d+)(?:\.(?P<role>.*))?$")


def places(names: Sequence[str]) -> list[tuple[int | None, str]]:
    """(block, role) of each name: ``encoder.layer.3.attention.self.query`` has block 3 and role
    ``attention.self.query``. A name without a number has block None and is its own role. If a model has several stacks
    (encoder and decoder), the role begins with the stack's name.

    Example:
        >>> places(["encoder.layer.3.output.dense", "pooler.dense"])
        [(3, 'output.dense'), (None, 'pooler.dense')]
    """
    matches = [_BLOCK.match(name) for name in names]
    stacks = {match["stack"] for match in matches if match}
    placed: list[tuple[int | None, str]] = []
    for name, match in zip(names, matches, strict=True):
        if not match:
            placed.append((None, name))
            continue
        stack, role = match["stack"] or "", match["role"] or ""
        if len(stacks) > 1 and stack:
            role = f"{stack}.{role}".rstrip(".")
        placed.append((int(match["block"]), role or stack or "layer"))
    return placed


def gaps(names: Iterable[str]) -> list[str]:
    """The layers that some blocks lack and others of their stack have, by the names that they would have.

    Example:
        >>> gaps(["layers.0.up", "layers.0.down", "layers.2.up", "layers.2.down", "layers.1.up"])
        ['layers.1.down']
    """
    blocks: dict[str, dict[str, set[int]]] = {}  # {stack: {role: its blocks}}
    for match in filter(None, map(_BLOCK.match, names)):
        stack = blocks.setdefault(match["stack"] or "", {})
        stack.setdefault(match["role"] or "", set()).add(int(match["block"]))
    return [
        ".".join(part for part in (stack, str(block), role) if part)
        for stack, roles in blocks.items() for role, there in roles.items()
        for block in range(max(map(max, roles.values())) + 1) if block not in there
    ]


def natural_key(name: str) -> list[tuple[int, str]]:
    """A key that sorts the numbers in names as numbers: "layer.10" after "layer.9".

    Numbers are runs of decimal digits, of any script and length; "²" or "①" is text.
    """
    parts = re.split(r"(\d+)", name)  # text and numbers in turn
    return [_number_key(part) if place % 2 else (0, part) for place, part in enumerate(parts)]


def _number_key(digits: str) -> tuple[int, str]:
    """Orders numbers by length, then by digits: int() refuses long ones."""
    plain = "".join(str(unicodedata.decimal(digit)) for digit in digits).lstrip("0")
    return len(plain), plain
