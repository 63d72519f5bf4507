"""A task from the user's own files: text classification, regression, token classification, causal-lm."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from ...errors import DataError
from ...files import sha256_of
from ..config import RunConfig
from ..file_task import FileTask
from .base import SPLITS, Features, PreparedTask
from .cells import Mistake, class_in, number_in, text_in, words_in
from .classes import check_labels, label_names, named_label, row_labels
from .encode import cut_note, encode_blocks, encode_texts, encode_words, limited
from .metrics import classification_metrics, regression_metrics, token_metrics
from .models import LoadedReference, builder, find_model
from .reading import Table
from .splitting import Row, Splits, read_splits
from .streams import streamed

_METRICS = {"regression": regression_metrics, "causal-lm": token_metrics}


def prepare(config: RunConfig) -> PreparedTask:
    """The task ``config.task`` describes; see :func:`rankalloc.experiments.tasks.prepare`."""
    task = config.task
    assert isinstance(task, FileTask)  # named tasks have modules of their own
    limits = {split: getattr(config.data, f"limit_{split}") for split in SPLITS}
    read = _read_splits(task, limits)
    splits, notes = read.rows, read.notes
    # Labels are collected before data.limit_train applies: a limit must not make a label unknown.
    names = label_names(splits["train"])
    check_labels(task, splits, names)
    splits = {split: limited(rows, limits[split]) for split, rows in splits.items()}

    found = find_model(config, task.kind)
    features: dict[str, Features] = {}
    for split, rows in splits.items():
        features[split], cut = _encode(found, rows, task, names, config.data.max_length)
        notes += cut_note(split, cut, len(rows), config.data.max_length)
        if not features[split]:
            raise DataError(f"the {split} split has fewer than two tokens; give more text")
    if read.stream is not None:  # only causal-lm
        features["train"] = streamed(
            read.stream, lambda rows, table: encode_blocks(
                found.tokenizer, [_read_text(task, row, table)["text"] for row in rows], config.data.max_length
            ), limits["train"], config.seed, notes,
        )
    words_or_tokens = task.kind in ("token-classification", "causal-lm")
    collator = (DataCollatorForTokenClassification if words_or_tokens else DataCollatorWithPadding)(found.tokenizer)
    return PreparedTask(
        name=task.kind,
        kind=task.kind,
        model_ref=found.reference,
        model_name=found.short_name,
        tokenizer=found.tokenizer,
        splits=features,
        collator=collator,
        build_model=builder(found, config, task.kind, names),
        metric=task.judged_by.metric,
        direction=task.judged_by.direction,
        metrics_of=_METRICS.get(task.kind, classification_metrics),
        fingerprint=sha256_of(*(part for split, rows in splits.items() for part in (split, *map(_identity, rows)))),
        labels=names,
        notes=found.notes + notes,
    )


def _read_splits(task: FileTask, limits: dict[str, int | None]) -> Splits:
    wanted = (task.text, task.text_pair, task.label if task.kind != "causal-lm" else None)

    def read(values: dict[str, Any], table: Table) -> dict[str, Any]:
        return _READERS[task.kind](task, values, table)

    columns = [column for column in wanted if column is not None]
    return read_splits(task, columns, read, lambda row: json.dumps(row.values["text"]), row_labels, limits)


# A reader turns a row's columns into "text" (and "pair", "label"), or raises a Mistake.


def _read_text(task: FileTask, values: dict[str, Any], table: Table) -> dict[str, Any]:
    named = (("text", task.text), ("pair", task.text_pair))
    return {key: text_in(values[column], column) for key, column in named if column is not None}


def _read_classified(task: FileTask, values: dict[str, Any], table: Table) -> dict[str, Any]:
    label = str(task.label)
    return _read_text(task, values, table) | {"label": class_in(named_label(values, label, table), label)}


def _read_number(task: FileTask, values: dict[str, Any], table: Table) -> dict[str, Any]:
    number = number_in(values[str(task.label)], str(task.label), table.decimal_comma)
    return _read_text(task, values, table) | {"label": number}


def _read_words(task: FileTask, values: dict[str, Any], table: Table) -> dict[str, Any]:
    words, labels = (words_in(values[str(column)], str(column)) for column in (task.text, task.label))
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise Mistake(f"{task.text!r} should hold words, got {word!r}")
    if len(words) != len(labels):
        raise Mistake(f"{len(words)} {task.text} and {len(labels)} {task.label}; each word needs one label")
    return {"text": words, "label": [class_in(label, str(task.label)) for label in labels]}


_READERS: dict[str, Callable[[FileTask, dict[str, Any], Table], dict[str, Any]]] = {
    "text-classification": _read_classified,
    "regression": _read_number,
    "token-classification": _read_words,
    "causal-lm": _read_text,
}


def _encode(
    found: LoadedReference, rows: list[Row], task: FileTask, names: list[str], max_length: int
) -> tuple[Features, int]:
    texts, number = [row.values["text"] for row in rows], {name: i for i, name in enumerate(names)}
    if task.kind == "causal-lm":
        return encode_blocks(found.tokenizer, texts, max_length), 0
    labels = [row.values["label"] for row in rows]
    if task.kind == "token-classification":
        return encode_words(found.tokenizer, texts, [[number[label] for label in row] for row in labels], max_length)
    pairs = [row.values["pair"] for row in rows] if task.text_pair else None
    numbered = labels if task.kind == "regression" else [number[label] for label in labels]
    return encode_texts(found.tokenizer, texts, pairs, numbered, max_length)


def _identity(row: Row) -> str:
    return json.dumps(row.values, sort_keys=True)
