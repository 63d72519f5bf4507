"""Data files of a test's own, and the configurations of tasks that read them."""

from __future__ import annotations

import json

from rankalloc.experiments.config import load_config
from rankalloc.experiments.tasks.packages import MINILM

SENTENCES = [
    f"{who} {verb} the {what} on {day}."
    for who in ("Anna", "the dog", "my uncle") for verb in ("sees", "sells") for what in ("boat", "red car", "tree")
    for day in ("Monday", "Friday")
]  # fmt: skip


def config(*overrides, **values):
    return load_config(None, [*overrides, *(f"{key.replace('__', '.')}={value}" for key, value in values.items())])


def file_config(kind, path, *overrides, model=MINILM):
    return config(f"task.kind={kind}", f"task.train={path}", f"model={model}", *overrides)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
