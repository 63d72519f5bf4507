"""Image and audio classification from the user's own folders and sets; each example is decoded when it is asked for."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly

from ...errors import ConfigError, DataError
from ...files import sha256_of
from ..config import RunConfig
from ..file_task import FileTask
from .base import SPLITS, PreparedTask
from .cells import Mistake, class_in, shown
from .classes import check_labels, label_names, named_label, row_labels
from .encode import limited
from .metrics import classification_metrics
from .models import builder, find_model
from .reading import Table
from .splitting import Row, read_splits

_LONGEST_SECONDS = 30
"""Sound of an example that is kept; the rest is cut."""


def prepare(config: RunConfig) -> PreparedTask:
    """The task ``config.task`` describes; see :func:`rankalloc.experiments.tasks.prepare`.

    Raises:
        ConfigError: what decodes the files is not installed.
    """
    task = config.task
    assert isinstance(task, FileTask)  # named tasks have modules of their own
    what = task.kind.partition("-")[0]
    if what == "image" and importlib.util.find_spec("PIL") is None:
        raise ConfigError(f'{task.kind} decodes files by Pillow: pip install "rankalloc[image]"')
    limits = {split: getattr(config.data, f"limit_{split}") for split in SPLITS}
    columns = (str(task.text), str(task.label))
    read = read_splits(task, columns, functools.partial(_read, task), _key, row_labels, limits)
    names = label_names(read.rows["train"])
    check_labels(task, read.rows, names)
    splits = {split: limited(rows, limits[split]) for split, rows in read.rows.items()}
    found = find_model(config, task.kind)
    if what == "audio" and not hasattr(found.tokenizer, "sampling_rate"):
        raise ConfigError(f"model {found.name!r} has no feature extractor of sounds, so it cannot learn {task.kind}")
    decoded = _image if what == "image" else _sound
    features = {split: _Media(rows, str(task.text), found.tokenizer, decoded, names) for split, rows in splits.items()}
    build_model = builder(found, config, task.kind, names)
    hashed = (part for split, rows in splits.items() for part in (split, *(f"{r.values}" for r in rows)))
    return PreparedTask(
        name=task.kind, kind=task.kind, model_ref=found.reference, model_name=found.short_name,
        tokenizer=found.tokenizer, splits=features, collator=_collated, build_model=build_model,
        metric=task.judged_by.metric, direction=task.judged_by.direction, metrics_of=classification_metrics,
        fingerprint=sha256_of(*hashed), labels=names, notes=[*found.notes, *read.notes],
    )  # fmt: skip


def _read(task: FileTask, values: dict[str, Any], table: Table) -> dict[str, Any]:
    """A row as the SHA-256 of its file's content, and the name of its class."""
    column, label = str(task.text), str(task.label)
    content = content_of(values[column], column)
    if task.kind == "audio-classification" and not _is_wav(content) and importlib.util.find_spec("soundfile") is None:
        raise ConfigError('sounds other than WAV are decoded by soundfile: pip install "rankalloc[audio]"')
    return {"content": hashlib.sha256(content).hexdigest(), "label": class_in(named_label(values, label, table), label)}


def content_of(value: Any, column: str) -> bytes:
    """The bytes of an image's or a sound's file, as ``datasets`` keeps it undecoded. Raises Mistake."""
    if isinstance(value, dict) and value.get("bytes"):
        return bytes(value["bytes"])
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str):
        raise Mistake(f"{column!r} should be a file, got {shown(value)}")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Mistake(f"the file {path} cannot be read: {error.strerror}") from None


class _Media(Sequence[dict[str, Any]]):
    """Rows as a model takes them, decoded one at a time."""

    def __init__(self, rows: list[Row], column: str, processor: Any, decoded: Any, names: list[str]) -> None:
        self.rows, self.column, self.processor, self.decoded = rows, column, processor, decoded
        self.number = {name: i for i, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        try:
            content = content_of(row.table.rows[row.index][self.column], self.column)
            inputs = self.decoded(content, self.processor)
        except Exception as error:  # decoders raise what they like
            raise DataError(f"{row.where}: the file cannot be decoded: {error}") from error
        return {**inputs, "labels": self.number[row.values["label"]]}


def _image(content: bytes, processor: Any) -> dict[str, torch.Tensor]:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return {"pixel_values": processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]}


def _sound(content: bytes, processor: Any) -> dict[str, torch.Tensor]:
    if _is_wav(content):
        rate, samples = wavfile.read(io.BytesIO(content))
        if samples.dtype.kind != "f":
            zero = 128 if samples.dtype == np.uint8 else 0
            samples = (samples.astype(np.float64) - zero) / (128 if zero else -float(np.iinfo(samples.dtype).min))
    else:
        import soundfile

        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    mono = samples.mean(1) if samples.ndim > 1 else samples
    mono, wanted = mono[: _LONGEST_SECONDS * rate], processor.sampling_rate
    mono = (mono if rate == wanted else resample_poly(mono, wanted, rate)).astype(np.float32)
    made = processor(mono, sampling_rate=wanted, return_tensors="pt")
    return {name: value[0] for name, value in made.items()}


def _is_wav(content: bytes) -> bool:
    return content[:4] == b"RIFF" and content[8:12] == b"WAVE"


def _collated(features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch, shorter sounds filled up with silence; what is filled is masked where the model has a mask for it."""
    batch: dict[str, torch.Tensor] = {"labels": torch.tensor([one["labels"] for one in features])}
    for name in features[0]:
        if name != "labels":
            batch[name] = torch.nn.utils.rnn.pad_sequence([one[name] for one in features], batch_first=True)
    return batch


def _key(row: Row) -> str:
    return str(row.values["content"])
