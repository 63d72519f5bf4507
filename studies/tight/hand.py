"""Patterns that someone writes in a line: a sort of layer, and the blocks where it begins.

A layer has rank 1 in its turn as long as the size allows; when every layer of the sort has one, each gets a second one,
and so on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from rankalloc.budget import LayerShape
from rankalloc.experiments.audits.hand_patterns import filled
from rankalloc.layer_names import places

Blocks = list[int]
_SORTS: dict[str, re.Pattern[str]] = {
    "query": re.compile(r"query|q_proj"), "key": re.compile(r"key|k_proj"), "value": re.compile(r"value|v_proj"),
    "output": re.compile(r"attention\.output|o_proj"), "in": re.compile(r"intermediate|(gate|up)_proj"),
    "out": re.compile(r"^output|down_proj"),
}  # fmt: skip
"""Which roles are of which sort, in the names of BERT's and of Llama's layers."""

STARTS: dict[str, Callable[[int], Blocks]] = {
    "first": lambda blocks: list(range(blocks)),
    "middle": lambda blocks: sorted(range(blocks), key=lambda block: (abs(2 * block - blocks + 1), block)),
    "last": lambda blocks: list(range(blocks))[::-1],
}
"""{where a pattern begins: all blocks in the order in which they get a rank}."""


def _layers(sorts: str, order: Blocks) -> list[tuple[str, int]]:
    """Block by block, the sorts in their order."""
    return [(sort, block) for block in order for sort in sorts.split()]


KINDS: dict[str, Callable[[Blocks], list[tuple[str, int]]]] = {
    "attention": lambda order: _layers("query value key output", order),
    "MLP-in": lambda order: _layers("in", order),
    "MLP-out": lambda order: _layers("out", order),
    "mixed": lambda order: _layers("in", order[: 2 * len(order) // 3]) + _layers("value", order),
}
"""{kind of pattern: (sort, block) in the order in which they get a rank}. "mixed" is the one that was found by hand on
both tasks before this study: the MLP's first layers of two thirds of the blocks, then values."""

HAND = [f"{kind}, {start} blocks" for kind in KINDS for start in STARTS]
QUERY_VALUE = "query and value"


def ranks_of(name: str, shapes: Sequence[LayerShape], params: int) -> dict[str, int]:
    """{layer: rank} of a pattern of :data:`HAND`, or of :data:`QUERY_VALUE`, with ``params`` parameters at most."""
    placed = [(shape, block, role) for shape, (block, role)
              in zip(shapes, places([shape.name for shape in shapes]), strict=True) if block is not None]
    blocks = 1 + max(block for _, block, _ in placed)
    if name == QUERY_VALUE:
        order = _layers("query value", STARTS["first"](blocks))
    else:
        kind, start = name.removesuffix(" blocks").split(", ")
        order = KINDS[kind](STARTS[start](blocks))
    chosen = [shape for sort, at in order for shape, block, role in placed if block == at and _SORTS[sort].search(role)]
    return filled(chosen, shapes, params)
