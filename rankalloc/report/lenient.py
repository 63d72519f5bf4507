"""Records that are odd but readable: what cannot be read or drawn is left out, and a note says what that was.

A report looks at runs of other versions and at runs that went wrong, so it is more patient than the code that resumes
them: unknown keys, numbers that no figure can hold (infinite, or integers beyond 2⁵³) and optional fields of a wrong
type are left out. What a record cannot do without is still an error.
"""

from __future__ import annotations

import copy
import math
import types
import typing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import RankallocError
from ..records import Record, parse_record
from .curves import LARGEST
from .wording import printable, some

LARGEST_INTEGER = 2**53  # beyond it floats, and with them figures, lose count
MOST_ROUNDS = 8  # of leaving out what the round before brought to light
R = TypeVar("R", bound=Record)
Place = tuple[str | int, ...]


def read_patiently(cls: type[R], data: Any, where: str, what: str) -> tuple[R, list[str]]:
    """The record in ``data``, and one note for each sort of thing that was left out.

    Raises:
        RankallocError: as :func:`~rankalloc.records.parse_record`, for what cannot be left out.
    """
    if not isinstance(data, dict):
        return parse_record(cls, data, where, what), []
    huge: list[str] = []
    data = copy.deepcopy(data)
    _drop_huge(data, (), huge)
    notes = _version(cls, data)
    if data.get("version") != cls.model_fields["version"].default:
        return parse_record(cls, data, where, what), []
    unknown: list[str] = []
    wrong: list[str] = []
    for _ in range(MOST_ROUNDS):
        try:
            record = cls.model_validate(data)
            break
        except ValidationError as error:
            if not _leave_out(cls, data, error, unknown, wrong):
                first = _path(error.errors()[0]["loc"])
                if first in huge:
                    raise RankallocError(
                        f"{where} cannot be shown: {first} is no number that a report can hold; it may be damaged"
                    ) from None
                return parse_record(cls, data, where, what), []
    else:
        return parse_record(cls, data, where, what), []
    notes += [
        f"Left out of the {what}, {reason}: {some(list(dict.fromkeys(places)))}."
        for places, reason in ((huge, "too large to show"), (unknown, "unknown to this version"), (wrong, "unreadable"))
        if places
    ]
    return record, notes


def _version(cls: type[Record], data: dict[str, Any]) -> list[str]:
    """Read a later minor version as this one."""
    known = cls.model_fields["version"].default
    found = data.get("version")
    if isinstance(found, str | float) and str(found).split(".")[0] == str(known):
        data["version"] = known
        return [f"It was written as version {printable(found)} and is read as version {known}."]
    return []


def _drop_huge(value: Any, place: Place, found: list[str]) -> None:
    """Remove from dicts, and turn to None in lists, what no figure can hold."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        if isinstance(item, dict | list):
            _drop_huge(item, (*place, key), found)
        elif isinstance(item, int | float) and not isinstance(item, bool) and _huge(item, isinstance(value, list)):
            found.append(_path((*place, key)))
            if isinstance(value, dict):
                del value[key]
            else:
                value[key] = None


def _huge(number: int | float, drawn: bool) -> bool:
    """Whether no figure can hold the number; a metric is only read, lists are ``drawn``."""
    if isinstance(number, int):
        return abs(number) > LARGEST_INTEGER
    return not math.isfinite(number) or (drawn and abs(number) > LARGEST)


def _leave_out(
    cls: type[Record], data: dict[str, Any], error: ValidationError, unknown: list[str], wrong: list[str]
) -> bool:
    """Remove what the errors are about; False when one of them is about something that is needed."""
    places: list[Place] = []
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        place: Place | None = one["loc"] if one["type"] == "extra_forbidden" else _optional(cls, one["loc"])
        if place is None:
            return False
        (unknown if one["type"] == "extra_forbidden" else wrong).append(_path(place))
        places.append(place)
    for place in sorted(set(places), key=lambda p: [(isinstance(k, str), k) for k in p], reverse=True):
        holder: Any = data
        try:
            for key in place[:-1]:
                holder = holder[key]
            del holder[place[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # a part of something that is gone already
    return True


def _optional(cls: type[BaseModel], loc: Place) -> Place | None:
    """The innermost part around ``loc`` that the record can do without."""
    found: Place | None = None
    model: type[BaseModel] | None = cls
    for depth, key in enumerate(loc, 1):
        if isinstance(key, int):
            found = loc[:depth] if found is not None and model is not None else found
        elif model is None:
            found = loc[:depth] if depth > 1 and isinstance(loc[depth - 2], str) else found
        elif key in model.model_fields:
            field = model.model_fields[key]
            found = found if field.is_required() else loc[:depth]
            model = _model_in(field.annotation)
        else:
            return found
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in ``Model``, ``Model | None`` or ``list[Model]``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


def _path(place: Place) -> str:
    """``evaluations.loss``: the place without the numbers of items, so that a thousand items are one entry."""
    return printable(".".join(str(key) for key in place if isinstance(key, str)) or "it")
