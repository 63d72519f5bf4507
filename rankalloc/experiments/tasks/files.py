"""A task from the user's own files: text classification, regression, token classification, causal-lm."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from ...errors import DataError
from ...files import sha256_of
from ..config import RunConfig
from ..sections import FileTask
from ..task_names import TASK_KINDS
from .base import SPLITS, Features, PreparedTask
from .encode import cut_note, encode_blocks, encode_texts, encode_words, limited
from .metrics import classification_metrics, regression_metrics
from .models import LoadedReference, builder, find_model
from .rows import Row, read_rows, split_rows

_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def prepare(config: RunConfig) -> PreparedTask:
    """The task ``config.task`` describes; see :func:`rankalloc.experiments.tasks.prepare`."""
    task = config.task
    assert isinstance(task, FileTask)  # named tasks have modules of their own
    splits = _read_splits(task)
    # Labels are collected before data.limit_train applies: a limit must not make a label unknown.
    names = _label_names(splits["train"])
    _check_labels(task, splits, names)
    splits = {split: limited(rows, getattr(config.data, f"limit_{split}")) for split, rows in splits.items()}

    found = find_model(config, task.kind)
    features, notes = {}, []
    for split, rows in splits.items():
        features[split], cut = _encode(found, rows, task, names, config.data.max_length)
        notes += cut_note(split, cut, len(rows), config.data.max_length)
        if not features[split]:
            raise DataError(f"the {split} split has fewer than two tokens; give more text")
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
        metric=TASK_KINDS[task.kind].metric,
        direction=TASK_KINDS[task.kind].direction,
        metrics_of=regression_metrics if task.kind == "regression" else classification_metrics,
        fingerprint=sha256_of(*(part for split, rows in splits.items() for part in (split, *map(_identity, rows)))),
        labels=names,
        notes=found.notes + notes,
    )


def _read_splits(task: FileTask) -> dict[str, list[Row]]:
    wanted = (task.text, task.text_pair, task.label if task.kind != "causal-lm" else None)
    columns = [column for column in wanted if column is not None]
    plain = task.text if task.kind == "causal-lm" else None
    splits: dict[str, list[Row]] = {}
    for split in SPLITS:
        path = getattr(task, split)
        if path is not None:
            rows = read_rows(path, columns, plain)
            for row in rows:
                _READERS[task.kind](task, row, f"{path}, line {row.line}")
            splits[split] = rows
    missing = {split: getattr(task, f"{split}_share") for split in SPLITS[1:] if split not in splits}
    if missing:
        rows = splits["train"]
        splits |= split_rows(rows, missing, lambda row: json.dumps(row.values["text"]), _row_labels)
        if not all(splits.values()):
            raise DataError(
                f"{task.train} is too small to split into train, {' and '.join(missing)}: its {len(rows)} rows should "
                f"have at least {len(missing) + 1} distinct texts and each label more than once; or give separate files"
            )
    return {split: splits[split] for split in SPLITS}


# A reader turns a row's columns into "text" (and "pair", "label"), or raises a DataError.


def _read_text(task: FileTask, row: Row, where: str) -> None:
    values: dict[str, Any] = {}
    for key, column in (("text", task.text), ("pair", task.text_pair)):
        if column is None:
            continue
        value = row.values[column]
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: {column!r} should be text, got {value!r}")
        values[key] = value
    row.values = {**values, "given": None if task.label is None else row.values.get(task.label)}


def _read_classified(task: FileTask, row: Row, where: str) -> None:
    _read_text(task, row, where)
    row.values["label"] = _label_name(row.values.pop("given"), task.label, where)


def _read_number(task: FileTask, row: Row, where: str) -> None:
    _read_text(task, row, where)
    given = row.values.pop("given")
    try:
        number = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: {task.label!r} should be a finite number, got {given!r}")
    row.values["label"] = number


def _read_words(task: FileTask, row: Row, where: str) -> None:
    words, labels = _listed(row, task.text), _listed(row, task.label)
    for column, value in ((task.text, words), (task.label, labels)):
        if not isinstance(value, list) or not value:
            raise DataError(f"{where}: {column!r} should be a list or words with blanks between them, got {value!r}")
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"{where}: {task.text!r} should hold words, got {word!r}")
    if len(words) != len(labels):
        raise DataError(f"{where}: {len(words)} {task.text} and {len(labels)} {task.label}; each word needs one label")
    row.values = {"text": words, "label": [_label_name(label, task.label, where) for label in labels]}


def _listed(row: Row, column: str | None) -> Any:
    """A column's value; text is split at blanks."""
    assert column is not None  # both columns have defaults
    value = row.values[column]
    return value.split() if isinstance(value, str) else value


def _read_document(task: FileTask, row: Row, where: str) -> None:
    _read_text(task, row, where)
    del row.values["given"]


_READERS: dict[str, Callable[[FileTask, Row, str], None]] = {
    "text-classification": _read_classified,
    "regression": _read_number,
    "token-classification": _read_words,
    "causal-lm": _read_document,
}


def _label_name(given: Any, column: str | None, where: str) -> str:
    if isinstance(given, float) or (isinstance(given, str) and _DECIMAL.fullmatch(given.strip())):
        raise DataError(f"{where}: {column!r} should be a class, got {given!r}; for numbers use kind: regression")
    if not isinstance(given, (str, int)) or not str(given).strip():
        raise DataError(f"{where}: {column!r} should be a class (text or a whole number), got {given!r}")
    return str(given).strip()


def _row_labels(row: Row) -> set[str]:
    label = row.values.get("label")
    return set(label) if isinstance(label, list) else {label} if isinstance(label, str) else set()


def _label_names(rows: list[Row]) -> list[str]:
    labels = set().union(*map(_row_labels, rows))
    whole = all(re.fullmatch(r"[+-]?\d{1,18}", label) for label in labels)
    return sorted(labels, key=lambda label: (int(label), label) if whole else label)


def _check_labels(task: FileTask, splits: dict[str, list[Row]], names: list[str]) -> None:
    if task.kind in ("regression", "causal-lm"):
        return
    if len(names) < 2:
        raise DataError(f"{task.train}: all rows have the label {names[0]!r}; there is nothing to tell apart")
    for split in SPLITS[1:]:
        for row in splits[split]:
            unseen = sorted(_row_labels(row) - set(names))
            if unseen:
                path = getattr(task, split) or task.train
                raise DataError(
                    f"{path}, line {row.line}: label {unseen[0]!r} does not occur in training; "
                    f"known: {', '.join(names)}"
                )


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
