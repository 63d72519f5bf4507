"""The types of a configuration's values, and what all its sections have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag


def _number(value: Any) -> Any:
    # Pydantic would read True as 1; in a configuration that is always a mistake.
    if isinstance(value, bool):
        raise ValueError(f"should be a number, got {value!r}")
    return value


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Number = Annotated[int | float, BeforeValidator(_number)]
Count = Annotated[Int, Field(ge=1)]
Positive = Annotated[Float, Field(gt=0)]
Share = Annotated[Float, Field(gt=0, le=1)]
Item = TypeVar("Item")
Keys = TypeVar("Keys", bound=BaseModel)
Choices = Annotated[list[Item], Field(min_length=1)]


def _shape_of(value: Any) -> str:
    return "<mapping>" if isinstance(value, (dict, BaseModel)) else "<list>" if isinstance(value, list) else "<one>"


# Unions that are resolved by the value's shape alone, so that a mistake is reported for the shape the user chose.
# The tag of the chosen branch is part of the error's location; "<" distinguishes it from a key.
_BY_SHAPE = Discriminator(_shape_of)
OneOrMore = Annotated[Annotated[Item, Tag("<one>")] | Annotated[Choices[Item], Tag("<list>")], _BY_SHAPE]
OneOrMapping = Annotated[Annotated[Item, Tag("<one>")] | Annotated[Keys, Tag("<mapping>")], _BY_SHAPE]
Searched = Annotated[
    Annotated[Item, Tag("<one>")] | Annotated[Choices[Item], Tag("<list>")] | Annotated[Keys, Tag("<mapping>")],
    _BY_SHAPE,
]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), allow_inf_nan=False, coerce_numbers_to_str=True, validate_default=True
    )


_WANTED = {
    "int": "should be a whole number", "float": "should be a number", "finite": "should be a finite number",
    "string": "should be text", "bool": "should be true or false", "list": "should be a list",
}
_BOUNDS = {
    "greater_than": "above", "greater_than_equal": "at least", "less_than": "below", "less_than_equal": "at most",
}


def wanted(kind: str, context: Mapping[str, Any]) -> str | None:
    """What a value of another type or size should have been; None for other kinds of mistakes."""
    if kind in _BOUNDS:
        bound = next(iter(context.values()))
        return f"should be {_BOUNDS[kind]} {bound:g}" if bound < 10**6 else f"should be {_BOUNDS[kind]} {bound}"
    if kind == "too_short":
        return "should hold at least one value"
    return _WANTED.get(kind.partition("_")[0])
