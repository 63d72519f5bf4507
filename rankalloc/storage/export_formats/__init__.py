"""Formats that :func:`rankalloc.export` writes. One file each; this is their registry."""

from __future__ import annotations

from . import kohya, peft
from .base import Export, Writer

EXPORT_FORMATS: dict[str, Writer] = {
    "peft": peft.write,
    "kohya": kohya.write,
}

__all__ = ["EXPORT_FORMATS", "Export", "Writer"]
