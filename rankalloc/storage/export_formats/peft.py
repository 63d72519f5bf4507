"""PEFT's own format, a folder; see :mod:`rankalloc.storage.folder`."""

from __future__ import annotations

from pathlib import Path

from .. import plain_lora
from ..folder import require_destination
from .base import Export


def write(export: Export) -> Path:
    require_destination(export.out, export.source)
    return plain_lora.write(export.lora, export.out, export.layout)
