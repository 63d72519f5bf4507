"""Rules: how ranks move while training. One file each; this is their registry."""

from __future__ import annotations

from .base import Rule

RULES: dict[str, type[Rule]] = {
    Rule.name: Rule,
}

__all__ = ["RULES", "Rule"]
