"""The position of a layer in the network, read from its name: the two axes of the rank map."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
