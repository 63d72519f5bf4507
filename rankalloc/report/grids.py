"""Layers by the place they have in the model: groups of one role, and the grid of roles × blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

OUTSIDE = "outside blocks"


class Placed(Protocol):
    """A layer with its place in the model."""

    @property
    def name(self) -> str: ...

    @property
    def block(self) -> int | None: ...

    @property
    def role(self) -> str: ...


@dataclass(frozen=True)
class Group:
    """The layers of one role, by block: a row of the rank map. ``blocks`` has None for a layer outside a
    stack; ``layers`` are indices into ``trace.layers``."""

    label: str
    blocks: list[int | None]
    layers: list[int]


@dataclass(frozen=True)
class RankMap:
    """Final ranks on a grid: ``cells[row][column]``, None where there is no layer. The last column is
    :data:`OUTSIDE` when ``outside`` is true. Means are over the layers present. ``layers`` holds each cell's index."""

    roles: list[str]
    columns: list[str]
    cells: list[list[int | None]]
    outside: bool
    row_means: list[float]
    column_means: list[float]
    layers: list[list[int | None]]


def groups(layers: Sequence[Placed]) -> list[Group]:
    """Layers by role, roles in order of appearance, blocks ascending, then the layers outside a stack.

    Two stacks (encoder and decoder) may share roles and block indices; the labels of their groups then
    include the part of the name before the block index.
    """
    seen: dict[tuple[int, str], int] = {}
    for layer in layers:
        if layer.block is not None:
            seen[layer.block, layer.role] = seen.get((layer.block, layer.role), 0) + 1
    shared = {role for (_, role), n in seen.items() if n > 1}
    rows: dict[str, list[tuple[int | None, int]]] = {}
    for i, layer in enumerate(layers):
        label = layer.role
        if layer.block is not None and layer.role in shared:
            label = f"{re.split(rf'[.]{layer.block}(?:[.]|$)', layer.name, maxsplit=1)[0]}: {layer.role}"
        if layer.block is None:
            label = layer.role or layer.name
        again, unique = 1, label
        while any(block == layer.block for block, _ in rows.get(unique, [])):
            again += 1
            unique = f"{label} ({again})"
        rows.setdefault(unique, []).append((layer.block, i))
    made = []
    for label, members in rows.items():
        members.sort(key=lambda pair: (pair[0] is None, pair[0] or 0))
        made.append(Group(label, [b for b, _ in members], [i for _, i in members]))
    return sorted(made, key=lambda group: group.blocks == [None])


def grid(rows: list[Group], values: Sequence[int | None]) -> RankMap:
    """One value a layer, laid out by role and block."""
    there = {block for group in rows for block in group.blocks}
    outside = None in there
    keys: list[int | None] = [*sorted(block for block in there if block is not None), *([None] if outside else [])]
    places = [dict(zip(group.blocks, group.layers, strict=True)) for group in rows]
    layers = [[at.get(key) for key in keys] for at in places]
    cells = [[None if i is None else values[i] for i in row] for row in layers]
    return RankMap(
        roles=[group.label for group in rows],
        columns=[OUTSIDE if key is None else str(key) for key in keys],
        cells=cells,
        outside=outside,
        row_means=[_mean(row) for row in cells],
        column_means=[_mean(column) for column in zip(*cells, strict=True)],
        layers=layers,
    )


def _mean(values: Iterable[int | None]) -> float:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else 0.0
