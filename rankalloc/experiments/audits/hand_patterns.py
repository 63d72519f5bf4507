"""Rank patterns that someone writes in a line, of a given size: rank 1 in the layers of one sort, in a fixed order.

Where a size is below one rank a layer, which layers get one decides, and a rule that chooses has to beat these. Layers
are taken in the pattern's order as long as they fit; when each has a rank and room is left, each gets a second one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ...budget import LayerShape
from ...layer_names import places

_ATTENTION = re.compile(
    r"attn|attention|(^|\.)(query|key|value|[qkvo]_proj|qkv_proj|out_proj|in_proj|wqkv|[qkv]_lin|out_lin)(\.|$)", re.I
)
_QUERY_VALUE = re.compile(r"(^|\.)(query|value|[qv]_proj|q_lin|v_lin|q|v|c_attn|qkv_proj|wqkv|in_proj)(\.|$)", re.I)


def pattern(name: str, shapes: Sequence[LayerShape], params: int) -> dict[str, int]:
    """{layer: rank} of the pattern ``name`` (a key of :data:`PATTERNS`) with ``params`` parameters at most; layers
    without a rank have 0."""
    return filled(PATTERNS[name](shapes), shapes, params)


def filled(order: Sequence[LayerShape], shapes: Sequence[LayerShape], params: int) -> dict[str, int]:
    """{layer: rank} of all ``shapes``: the layers of ``order`` get a rank each in turn, again and again, as long as
    one of them fits into ``params`` parameters."""
    ranks, left = {shape.name: 0 for shape in shapes}, params
    while True:
        before = left
        for shape in order:
            if shape.params_per_rank <= left and ranks[shape.name] < min(shape.d_in, shape.d_out):
                ranks[shape.name] += 1
                left -= shape.params_per_rank
        if left == before:
            return ranks


def _of_sort(shapes: Sequence[LayerShape], attention: bool) -> list[LayerShape]:
    """The attention's layers (query and value of every block first) or the others, module type by module type."""
    placed = list(zip(shapes, places([shape.name for shape in shapes]), strict=True))
    own = [(shape, block, role) for shape, (block, role) in placed if bool(_ATTENTION.search(role)) == attention]
    roles = list(dict.fromkeys(role for _, _, role in own))
    if attention:
        roles.sort(key=lambda role: not _QUERY_VALUE.search(role))
    return [shape for kind in roles for shape, _, role in own if role == kind]


def _by_block(shapes: Sequence[LayerShape], last: bool) -> list[LayerShape]:
    """All layers, from the first block on, or from the last one back; those outside any stack come at the end."""
    placed = list(zip(shapes, places([shape.name for shape in shapes]), strict=True))
    inside = [(block, shape) for shape, (block, _) in placed if block is not None]
    inside.sort(key=lambda one: -one[0] if last else one[0])
    return [shape for _, shape in inside] + [shape for shape, (block, _) in placed if block is None]


PATTERNS: dict[str, Callable[[Sequence[LayerShape]], list[LayerShape]]] = {
    "attention": lambda shapes: _of_sort(shapes, attention=True),
    "mlp": lambda shapes: _of_sort(shapes, attention=False),
    "first-blocks": lambda shapes: _by_block(shapes, last=False),
    "last-blocks": lambda shapes: _by_block(shapes, last=True),
}
"""{pattern: the layers in the order in which they get a rank}."""
