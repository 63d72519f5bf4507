"""Sentiment of one-sentence film reviews (rotten tomatoes), positive or negative, by accuracy.

Ranks hardly matter here: a task on which rank allocation has little to gain.
"""

from __future__ import annotations

import random

from transformers import DataCollatorWithPadding

from ...files import sha256_of
from ..config import RunConfig
from . import TASKS
from .base import PreparedTask
from .encode import cut_note, encode_texts
from .metrics import classification_metrics
from .models import builder, find_model
from .packages import reviews

LABELS = ["negative", "positive"]
DEFAULT_LIMITS = {"train": 2000, "tune": 500, "report": 500}


def sentences() -> dict[str, list[tuple[str, int]]]:
    """(text, label) by split: 80, 10 and 10 % of all, shuffled with a fixed seed."""
    rows = list(reviews("rotten_tomatoes"))
    random.Random(20240229).shuffle(rows)
    tenth = len(rows) // 10
    return {"train": rows[: -2 * tenth], "tune": rows[-2 * tenth : -tenth], "report": rows[-tenth:]}


def prepare(config: RunConfig) -> PreparedTask:
    """The task for a model of the user's choice; see :func:`rankalloc.experiments.tasks.prepare`."""
    info = TASKS["sentiment"]
    found = find_model(config, info.kind, info.default_model)
    splits, notes, hashed = {}, [], []
    for split, rows in sentences().items():
        rows = rows[: getattr(config.data, f"limit_{split}") or DEFAULT_LIMITS[split]]
        texts, labels = [text for text, _ in rows], [label for _, label in rows]
        splits[split], cut = encode_texts(found.tokenizer, texts, None, labels, config.data.max_length)
        notes += cut_note(split, cut, len(rows), config.data.max_length)
        hashed += [split, *(f"{label}\t{text}" for text, label in rows)]
    return PreparedTask(
        name=info.name, kind=info.kind, model_ref=found.reference, model_name=found.short_name,
        tokenizer=found.tokenizer, splits=splits, collator=DataCollatorWithPadding(found.tokenizer),
        build_model=builder(found, config, info.kind, LABELS), metric=info.metric, direction=info.direction,
        metrics_of=classification_metrics, fingerprint=sha256_of(*hashed), labels=list(LABELS), notes=notes,
    )  # fmt: skip
