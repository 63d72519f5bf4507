"""Nothing that users of version 0.1 hold on to has gone, or means something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .interface import interface

THEN = json.loads(Path(__file__).with_name("interface.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def now() -> dict[str, Any]:
    return interface()


@pytest.mark.parametrize("part", THEN)
def test_all_of_0_1_is_still_there(part, now):
    assert _lost(THEN[part], now[part]) == []


def _lost(then: Any, now: Any, path: str = "") -> list[str]:
    """What ``now`` lacks of ``then``, or says otherwise; what came to it is no loss."""
    if isinstance(then, dict):
        if not isinstance(now, dict):
            return [path]
        return [line for key in then for line in _lost(then[key], now.get(key), f"{path}/{key}")]
    if isinstance(then, list) and path.endswith("parameters"):
        return [] if _still_called(then, now) else [f"{path}: {then} became {now}"]
    if isinstance(then, list):
        return [f"{path}: {item}" for item in then if now is None or item not in now]
    return [] if then == now else [f"{path}: {then!r} became {now!r}"]


def _still_called(then: list[str], now: list[str] | None) -> bool:
    """Whether every call that ``then`` allowed means the same: same order, same defaults, additions at the end.

    What had to be given may have got a default."""
    if now is None:
        return False
    now = [p.split("=")[0] if p not in then and p.split("=")[0] in then else p for p in now]
    positional = [list(p[: p.index("*")] if "*" in p else p) for p in (then, now)]
    return positional[1][: len(positional[0])] == positional[0] and all(p in now for p in then)


def test_a_lost_option_would_be_seen():
    assert _lost({"parameters": ["a", "b=1"]}, {"parameters": ["a", "b=2"]}) != []
    assert _lost({"methods": ["auto"]}, {"methods": []}) == ["/methods: auto"]
    assert _lost({"parameters": ["a", "b=1"]}, {"parameters": ["b=1"]}) != []
    assert _lost({"parameters": ["a", "b=1"]}, {"parameters": ["a=None", "b=1"]}) == []
    assert _lost({"x": {"y": "attribute"}}, {"x": {}}) != []
    assert _lost({"parameters": ["a", "b=1"]}, {"parameters": ["a", "b=1", "c=2"]}) == []
