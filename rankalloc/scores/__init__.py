"""Importance scores. One file each; this is their registry."""

from __future__ import annotations

from .base import Score
from .sensitivity import Sensitivity

SCORES: dict[str, type[Score]] = {
    Sensitivity.name: Sensitivity,
}

__all__ = ["SCORES", "Score"]
