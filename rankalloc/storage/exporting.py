"""Writing a finished adapter again for another tool, in one of the :mod:`.export_formats`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, unknown
from . import plain_lora
from .export_formats import EXPORT_FORMATS, Export
from .folder import WEIGHTS_NAME
from .layout import Layout
from .readers import find_reader
from .reading import FinishedAdapter
from .tensors import TensorFile


@dataclass(frozen=True)
class Exported:
    """An adapter that was written for another tool.

    Attributes:
        path: the folder or file.
        params: numbers of the ranks that the adapter has.
        stored: numbers in the pairs of factors that were written, zero padding included.
        padding_bytes: bytes of the padding.
    """

    path: Path
    params: int
    stored: int
    padding_bytes: int


def export(
    adapter: str | os.PathLike, out: str | os.PathLike, *, reader: str | None = None, layout: str | None = None,
    pad_to: int = 1, format: str | None = None, prefix: str | None = None, base: str | os.PathLike | None = None,
) -> Path:
    """Write a finished adapter again in the form that another tool reads; it computes the same as before.

    Args:
        adapter: folder with a PEFT LoRA, written by rankalloc or any other tool.
        out: folder to write for "peft"; the file to write for the other formats.
        reader: the tool that it is for, a key of :data:`rankalloc.READERS`: it decides on format, layout and padding.
        layout: of a folder: "compact" (None, a rank_pattern), "uniform" (one rank, zeros where a layer has fewer) or
            "one-alpha" (a rank_pattern and one alpha).
        pad_to: in the uniform layout, and in kohya's files, round ranks up to a multiple of this.
        format: "peft" (None), "kohya", "diffusers" or "gguf" (llama.cpp's).
        prefix: of the names in kohya's files (lora_unet, lora_te, lora_te1, lora_te2) and in those of diffusers (unet,
            transformer, text_encoder, text_encoder_2); None for lora_unet and unet.
        base: for "gguf": the base model's folder or its config.json; None takes the one that the adapter names.

    Returns:
        ``out``.

    Raises:
        AdapterFileError: the adapter is damaged, or not a plain LoRA.
        ConfigError: an option does not exist or does not fit.
        RankallocError: the format cannot hold this adapter: it has heads, embeddings or grouped convolutions, or two
            layers would get the same name. Nothing is written then.
    """
    return write_export(
        adapter, out, reader=reader, layout=layout, pad_to=pad_to, format=format, prefix=prefix, base=base
    ).path


def write_export(
    adapter: str | os.PathLike, out: str | os.PathLike, *, reader: str | None, layout: str | None, pad_to: int,
    format: str | None, prefix: str | None, base: str | os.PathLike | None,
) -> Exported:
    """As :func:`export`; returns what was written, and how much of it only pads ranks."""
    pads: int | tuple[int, ...] = pad_to
    if reader is not None:
        if layout is not None or pad_to != 1 or format is not None:
            raise ConfigError(
                f"the reader {reader!r} decides on format, layout and padding; give it, or them, and not both"
            )
        chosen = find_reader(reader)
        layout, pads = chosen.layout, chosen.pad_to
        # llama.cpp has a format of its own, and a converter that reads folders
        format = "peft" if chosen.layouts and not str(out).endswith(f".{chosen.format}") else chosen.format
        layout = layout if format == "peft" else None
    format = format or "peft"
    if format not in EXPORT_FORMATS:
        raise ConfigError(unknown("format", format, EXPORT_FORMATS))
    stored = Layout(layout or ("compact" if pads == 1 else "uniform"), pads, reader or "").check()
    lora = plain_lora.read(adapter)
    path = EXPORT_FORMATS[format](Export(lora, FinishedAdapter(adapter).folder, out, stored, prefix, base))
    if path.suffix == ".gguf":
        return Exported(path, lora.num_params(), lora.num_params(), 0)
    numbers, size = _factors_in(path)
    return Exported(path, lora.num_params(), numbers, size - lora.num_bytes())


def _factors_in(path: Path) -> tuple[int, int]:
    """The numbers in the pairs of factors of a folder or file, and their bytes."""
    specs = TensorFile(path / WEIGHTS_NAME if path.is_dir() else path).specs
    factors = [spec for key, spec in specs.items() if "lora_" in key and len(spec.shape) > 1]
    sizes = [math.prod(spec.shape) for spec in factors]
    return sum(sizes), sum(size * spec.dtype.itemsize for size, spec in zip(sizes, factors, strict=True))
