"""What a JSON file is, by its keys: for a sentence on a file that was given in the place of another."""

from __future__ import annotations

from typing import Any

RUN, SWEEP, AUDIT = "the record of a run", "the record of a sweep", "the record of an audit"
ADAPTER = "an adapter's configuration"

_KEYS: tuple[tuple[str, frozenset[str]], ...] = (
    ("the data of a report", frozenset({"trace", "sweep", "control"})),
    (AUDIT, frozenset({"arms", "comparisons", "looks"})),
    (SWEEP, frozenset({"trials", "space"})),
    (RUN, frozenset({"layers", "budget", "scaling"})),
    ("the record of a cut adapter", frozenset({"sources", "layers", "ranks"})),
    ("the record of rankalloc frontier", frozenset({"points", "knee"})),
    ("the record of rankalloc check", frozenset({"keeping", "curve", "layers"})),
    ("the short form of a report", frozenset({"kind", "verdict"})),
    (ADAPTER, frozenset({"peft_type"})),
    ("a model's configuration", frozenset({"model_type"})),
    ("a model's configuration", frozenset({"architectures"})),
    ("a tokenizer's configuration", frozenset({"tokenizer_class"})),
    ("the state of a checkpoint's trainer", frozenset({"global_step", "log_history"})),
    ("a list of a model's files", frozenset({"weight_map"})),
)


def what_is(data: Any) -> str | None:
    """What parsed JSON is, in a few words; None where its keys do not say. A configuration of a run has none of
    these."""
    if not isinstance(data, dict):
        return None
    return next((what for what, keys in _KEYS if keys <= set(data)), None)


def shape_of(data: Any) -> str:
    """What parsed JSON or YAML is where it is no mapping: "a list", "text"."""
    return {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}.get(
        type(data), f"a {type(data).__name__}"
    )
