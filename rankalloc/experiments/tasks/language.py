"""Tasks of which the model writes text, from the user's own data: chat, prompt-completion, preference and seq2seq."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
from transformers import DataCollatorForSeq2Seq, DataCollatorForTokenClassification

from ...errors import DataError
from ...files import sha256_of
from ..config import RunConfig
from ..file_task import FileTask
from .base import SPLITS, PreparedTask
from .cells import Mistake, text_in
from .conversations import conversation, form_of, options_in, pair, preference, tools_in
from .encode import limited
from .generation import Generation, scorer
from .metrics import token_metrics
from .models import builder, find_model
from .preference import Preferences
from .reading import Table
from .splitting import Row, read_splits
from .streams import streamed
from .writing import Writer

_LEARNT = {
    "assistant": "the loss is on what the assistant says in every turn (task.loss_on)",
    "completion": "the loss is on the completion, and not on what comes before it (task.loss_on)",
    "all": "the loss is on every token, what the user says included (task.loss_on)",
}


def prepare(config: RunConfig) -> PreparedTask:
    """The task ``config.task`` describes; see :func:`rankalloc.experiments.tasks.prepare`."""
    task = config.task
    assert isinstance(task, FileTask)  # named tasks have modules of their own
    form = _Form(task)
    limits = {split: getattr(config.data, f"limit_{split}") for split in SPLITS}
    read = read_splits(task, (), form.read, _key, lambda row: set(), limits)
    splits = {split: limited(rows, limits[split]) for split, rows in read.rows.items()}
    notes = [*read.notes, *form.notes, *([_LEARNT[task.loss_on]] if task.loss_on else [])]

    found = find_model(config, task.kind)
    writer = Writer(found.tokenizer, task, config.data.max_length)
    every = [row for rows in splits.values() for row in rows]
    notes += writer.choose_template([row.values for row in every])
    features: dict[str, Any] = {}
    for split, rows in splits.items():
        kept = [(row, made) for row in rows if (made := _made(writer, row))]
        dropped, splits[split] = len(rows) - len(kept), [row for row, _ in kept]
        features[split] = [made for _, made in kept]
        notes += _length_notes(writer, split, dropped, len(rows), config.data.max_length)
        if not kept:
            raise DataError(
                f"no {split} example has anything to learn within data.max_length {config.data.max_length} tokens; "
                "set it higher"
            )
    if read.stream is not None:
        features["train"] = streamed(
            read.stream, lambda rows, table: [made for row in rows if (made := writer.features(form.read(row, table)))],
            limits["train"], config.seed, notes,
        )  # fmt: skip
    judged, build_model = task.judged_by, builder(found, config, task.kind, [])
    prepared = PreparedTask(
        name=task.kind, kind=task.kind, model_ref=found.reference, model_name=found.short_name,
        tokenizer=found.tokenizer, splits=features, collator=_collator(task.kind, found.tokenizer),
        build_model=build_model, metric=judged.metric, direction=judged.direction, metrics_of=token_metrics,
        fingerprint=sha256_of(*(part for split, rows in splits.items() for part in (split, *map(_identity, rows)))),
        notes=[*found.notes, *notes], trainer=judged.trainer,
    )  # fmt: skip
    if task.kind == "preference":
        prepared.rows = {split: _trl_rows(rows) for split, rows in splits.items()}
        prepared.comparison = Preferences(features, found.tokenizer, build_model, task.beta)
    elif task.metric is not None and (score := scorer(task.metric)) is not None:
        asked = {split: [writer.prompt(row.values) for row in splits[split]] for split in SPLITS[1:]}
        prepared.generated_metrics = Generation(found.tokenizer, asked, score, judged.metric, task.max_new_tokens)
    return prepared


class _Form:
    """How the rows of each table are read: by its columns, which are looked at once."""

    def __init__(self, task: FileTask) -> None:
        self.task, self.notes = task, list[str]()
        self._forms: dict[str, str] = {}

    def read(self, values: dict[str, Any], table: Table) -> dict[str, Any]:
        """A row as what the kind has in TRL's columns, and its tools and the template's options. Raises Mistake."""
        task = self.task
        if task.kind == "seq2seq":
            return self._texts(values, table)
        if table.source not in self._forms:
            try:
                self._forms[table.source], notes = form_of(task.kind, table.columns, task.text, task.label)
            except Mistake as mistake:
                raise DataError(f"{table.source}: {mistake}") from None
            self.notes += [note for note in notes if note not in self.notes]
        form = self._forms[table.source]
        further = {"tools": tools_in(values), "chat_template_kwargs": options_in(values)}
        further = {name: value for name, value in further.items() if value}
        if task.kind == "chat":
            messages = conversation(form, values, task.text)
            if task.loss_on != "all" and not any(message["role"] == "assistant" for message in messages):
                raise Mistake("there is no turn of the assistant to learn from")
            return {"messages": messages, **further}
        if task.kind == "preference":
            return {**preference(values), **further}
        prompt, completion = pair(form, values, task.text, task.label)
        return {"prompt": prompt, "completion": completion, **further}

    def _texts(self, values: dict[str, Any], table: Table) -> dict[str, Any]:
        named = (("prompt", str(self.task.text)), ("completion", str(self.task.label)))
        missing = [column for _, column in named if column not in table.columns]
        if missing:
            raise DataError(
                f"{table.source}: no column {missing[0]!r}; columns: {', '.join(map(repr, table.columns))}; name them "
                "by task.text and task.label"
            )
        return {key: text_in(values[column], column) for key, column in named}


def _made(writer: Writer, row: Row) -> dict[str, Any] | None:
    try:
        return writer.features(row.values)
    except Mistake as mistake:
        raise DataError(f"{row.where}: {mistake}") from None


def _key(row: Row) -> str:
    """Rows of one prompt are never in two splits."""
    return json.dumps(row.values.get("prompt", row.values), sort_keys=True)


def _identity(row: Row) -> str:
    return json.dumps(row.values, sort_keys=True)


def _length_notes(writer: Writer, split: str, dropped: int, total: int, longest: int) -> list[str]:
    cut, writer.cut = writer.cut, 0
    notes = [f"{cut} of {total} {split} examples were cut at data.max_length {longest} tokens"] if cut else []
    if dropped:
        notes.append(f"{dropped} of {total} {split} examples have nothing to learn within {longest} tokens: left out")
    return notes


def _collator(kind: str, tokenizer: Any) -> Any:
    if kind == "seq2seq":
        return DataCollatorForSeq2Seq(tokenizer)
    collator = DataCollatorForTokenClassification(tokenizer)
    return partial(_chosen_only, collator) if kind == "preference" else collator


def _chosen_only(collator: Any, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "labels")
    return dict(collator([{name: one[name] for name in names} for one in features]))


def _trl_rows(rows: list[Row]) -> datasets.Dataset:
    """The rows in TRL's columns; tools are JSON, which it reads."""
    values = [
        {**row.values, **({"tools": json.dumps(row.values["tools"])} if "tools" in row.values else {})} for row in rows
    ]
    return datasets.Dataset.from_list(values, on_mixed_types="use_json")
