"""Versioned JSON records: strict models, read with one clear sentence for everything that can be wrong."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import RankallocError


class Record(BaseModel):
    """Plain data that refuses unknown fields. A record that is a whole file has a field ``version``."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


R = TypeVar("R", bound=Record)


def finite(value: Any) -> Any:
    """``value`` without non-finite floats, which JSON cannot hold: they are left out of dicts and become None in
    lists."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items() if not (isinstance(v, float) and not math.isfinite(v))}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def load_record(cls: type[R], path: str | os.PathLike, what: str) -> R:
    """The record in the file at ``path``, which messages call a ``what``.

    Raises:
        RankallocError: the file is missing or is not such a record.
    """
    path = Path(path)
    return parse_record(cls, read_json(path, what), str(path), what)


def read_json(path: Path, what: str) -> Any:
    """The parsed content of ``path``, which should hold a ``what``; RankallocError when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RankallocError(f"no {what} at {path}; give the folder a run wrote to, or its {path.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RankallocError(f"could not read {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise RankallocError(
            f"{path} is no JSON (line {error.lineno}); it may be damaged or no {what} at all"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise RankallocError(f"{path} is no JSON that can be read ({error}); it may be damaged") from None


def parse_record(cls: type[R], data: Any, where: str, what: str) -> R:
    """Parsed JSON as a validated record. ``where`` says in messages where the data is, ``what`` what it should be.

    Raises:
        RankallocError: the data is no object, has another version, or lacks or adds fields.
    """
    if not isinstance(data, dict):
        raise RankallocError(f"{where} is no {what}: it holds a {type(data).__name__}, not an object")
    version = cls.model_fields["version"].default
    if data.get("version") != version:
        raise RankallocError(
            f"{where} is a {what} of version {data.get('version')!r}, and this rankalloc reads version {version}"
        )
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise RankallocError(f"{where} is no valid {what}: {field}: {first['msg']}") from None
