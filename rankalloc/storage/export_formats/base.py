"""What an export format is asked to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..layout import Layout
from ..left_out import left_out_entry, left_out_in
from ..plain_lora import PlainLora


@dataclass(frozen=True)
class Export:
    """One adapter on its way to another tool.

    Attributes:
        lora: the whole adapter, in memory.
        source: the folder it was read from.
        out: what to write, a folder or a file.
        layout: how ranks are padded.
        prefix: of the tensors' names, for formats that have one; None for the format's own.
        base: the base model's folder or configuration, for formats that need one; None for what the adapter names.
    """

    lora: PlainLora
    source: Path
    out: str | os.PathLike
    layout: Layout
    prefix: str | None
    base: str | os.PathLike | None = None

    def metadata(self) -> dict[str, str]:
        """What of the adapter's metadata a file keeps, and the layers without ranks that it leaves out."""
        pairs = self.lora.pairs.items()
        linear = {n: (a.shape[1], len(b)) for n, (a, b) in pairs if not len(a) and a.dim() == 2}
        left_out = {} if self.layout.uniform else left_out_in(self.lora.metadata) | linear
        return self.lora.metadata | left_out_entry(left_out)


Writer = Callable[[Export], Path]
"""Writes ``out`` whole or not at all and returns it; raises RankallocError when the format cannot hold the adapter."""
