"""Records of finished adapters: of ``rankalloc shrink`` and ``compose``, of ``frontier``, and of ``check --json``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import RankallocError
from ..layer_names import places
from .kinds import Kind, Source
from .side import Side, SideLayer


class CutLayer(BaseModel):
    """One layer before and after a cut."""

    name: str
    d_in: int
    d_out: int
    rank_before: int
    rank: int
    relative_error: float


class CutRecord(BaseModel):
    """What a report needs of ``shrink.json``."""

    sources: list[str]
    metric: str
    error: float
    layers: list[CutLayer]


class FrontierPoint(BaseModel):
    """One budget and the quality at it."""

    params: int
    ranks: int
    error: float
    value: float


class FrontierRecord(BaseModel):
    """What a report needs of ``frontier.json``."""

    metric: str
    higher_is_better: bool
    points: list[FrontierPoint]
    knee: FrontierPoint | None = None
    recovered: int = 0


class CheckedLayer(BaseModel):
    """One layer of an adapter that was checked."""

    name: str
    role: str
    block: int | None
    d_in: int
    d_out: int
    rank: int
    used: int
    effective: float
    norm: float
    share: float


class CheckRecord(BaseModel):
    """What a report needs of ``rankalloc check --json``."""

    path: str
    kind: str
    base: str | None
    dtype: str
    layers: list[CheckedLayer]
    stored: int
    params: int
    bytes: int
    curve: list[tuple[int, float]]
    keeping: dict[float, int]
    readers: list[dict[str, Any]]
    alerts: list[str]
    interference: list[dict[str, Any]] = []


def _reader(name: str, model: type[BaseModel]) -> Callable[[dict[str, Any], Path], Source]:
    """A function that keeps what the page needs under ``name``."""

    def read(data: dict[str, Any], path: Path) -> Source:
        try:
            record = model.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise RankallocError(f"{path} is no valid record of a {name}: {field}: {first['msg']}") from None
        return Source(None, parts={name: record.model_dump(mode="json")})

    return read


def cut_side(source: Source) -> Side:
    """An adapter after a cut."""
    record = CutRecord.model_validate(source.parts["cut"])
    where = places([layer.name for layer in record.layers])
    return Side(
        name=" + ".join(record.sources) or "adapter",
        what="adapter after a cut",
        layers=[
            SideLayer(layer.name, block, role, layer.rank, layer.d_in + layer.d_out)
            for layer, (block, role) in zip(record.layers, where, strict=True)
        ],
        config={"metric": record.metric},
    )


def check_side(source: Source) -> Side:
    """An adapter that was checked, at the ranks that it uses."""
    record = CheckRecord.model_validate(source.parts["check"])
    return Side(
        name=Path(record.path).name or record.path,
        what="adapter",
        layers=[
            SideLayer(layer.name, layer.block, layer.role, layer.used, layer.d_in + layer.d_out)
            for layer in record.layers
        ],
        config={"base": record.base, "dtype": record.dtype, "kind": record.kind},
    )


CUT = Kind(
    "cut", "shrink.json", lambda data: {"sources", "layers", "ranks"} <= set(data), _reader("cut", CutRecord), cut_side,
    lambda data: " + ".join(data["sources"]) or "adapter",
)
FRONTIER = Kind(
    "frontier", "frontier.json", lambda data: {"points", "knee"} <= set(data), _reader("frontier", FrontierRecord),
    title=lambda data: f"{data['metric']} against size",
)
CHECK = Kind(
    "check", None, lambda data: {"keeping", "curve", "layers"} <= set(data), _reader("check", CheckRecord), check_side,
    lambda data: Path(data["path"]).name or data["path"],
)
