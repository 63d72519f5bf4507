"""Writing a finished adapter again for another tool, in one of the :mod:`.export_formats`."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ConfigError, unknown
from . import plain_lora
from .export_formats import EXPORT_FORMATS, Export
from .layout import Layout
from .reading import FinishedAdapter


def export(
    adapter: str | os.PathLike, out: str | os.PathLike, *, layout: str = "uniform", pad_to: int = 1,
    format: str = "peft", prefix: str = "lora_unet",
) -> Path:
    """Write a finished adapter again in the form that another tool reads; it computes the same as before.

    Args:
        adapter: folder with a PEFT LoRA, written by rankalloc or any other tool.
        out: folder to write for "peft"; the ``.safetensors`` file to write for "kohya".
        layout: "uniform" (one rank, zeros where a layer has fewer) or "compact" (a rank_pattern); "peft" only.
        pad_to: in the uniform layout, round the one rank up to a multiple of this; some servers want 8 or 16.
        format: "peft", or "kohya": one file, alpha equal to each layer's own rank, padded only by ``pad_to``.
        prefix: of kohya's names: lora_unet, lora_te, lora_te1, lora_te2.

    Returns:
        ``out``.

    Raises:
        AdapterFileError: the adapter is damaged, or not a plain LoRA.
        ConfigError: an option does not exist or does not fit.
        RankallocError: kohya's format cannot hold this adapter: it has heads, embeddings or grouped convolutions, or
            two layers would get the same name. Nothing is written then.
    """
    if format not in EXPORT_FORMATS:
        raise ConfigError(unknown("format", format, EXPORT_FORMATS))
    stored = Layout(layout, pad_to).check()
    lora = plain_lora.read(adapter)
    return EXPORT_FORMATS[format](Export(lora, FinishedAdapter(adapter).folder, out, stored, prefix))
