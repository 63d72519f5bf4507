"""Formats that :func:`rankalloc.export` writes. One file each; this is their registry."""

from __future__ import annotations

from . import diffusers, gguf, kohya, peft
from .base import Export, Writer

EXPORT_FORMATS: dict[str, Writer] = {
    "peft": peft.write,
    "kohya": kohya.write,
    "diffusers": diffusers.write,
    "gguf": gguf.write,
}

__all__ = ["EXPORT_FORMATS", "Export", "Writer"]
