"""Layers without ranks, which a folder leaves out: its metadata names them, so that another layout can hold them.

Some tools want every layer in the file. TGI adapts a kind of layer in all blocks or in none, and PEFT's hot swap wants
the layers of the adapter that it replaces. A uniform folder made from a compact one is therefore given them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..errors import AdapterFileError

LEFT_OUT_KEY = "rankalloc_left_out"
"""In the weights file's metadata: JSON of {layer name: [d_in, d_out]}, of linear layers alone."""

_MOST_SIDE, _MOST_LAYERS = 2**21, 100_000  # of what a file may ask for without holding it


def left_out_in(metadata: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """{name: (d_in, d_out)} of the layers that the folder leaves out. Raises AdapterFileError when they are damaged."""
    if LEFT_OUT_KEY not in metadata:
        return {}
    try:
        found = {str(name): tuple(sides) for name, sides in json.loads(metadata[LEFT_OUT_KEY]).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        found = None
    if found is None or len(found) > _MOST_LAYERS or not all(map(_are_sides, found.values())):
        raise AdapterFileError(f"the metadata of the adapter is damaged: {LEFT_OUT_KEY} does not hold layers and sizes")
    return found


def left_out_entry(layers: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """The entry of the metadata for these layers; empty for none."""
    return {LEFT_OUT_KEY: json.dumps({name: list(sides) for name, sides in layers.items()})} if layers else {}


def _are_sides(sides: tuple[object, ...]) -> bool:
    return len(sides) == 2 and all(type(side) is int and 1 <= side <= _MOST_SIDE for side in sides)
