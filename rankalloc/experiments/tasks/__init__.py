"""The tasks to train on: named tasks (model, data and metric under one name) and the user's own files.

Importing this module is cheap; :func:`prepare` loads torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..task_names import LANGUAGE_KINDS, MEDIA_KINDS, TASK_KINDS, TASKS, KindInfo, TaskInfo

if TYPE_CHECKING:
    from ..config import RunConfig
    from .base import PreparedTask


__all__ = ["TASK_KINDS", "TASKS", "KindInfo", "TaskInfo", "load_task", "metric_of", "prepare"]


def metric_of(config: RunConfig) -> KindInfo:
    """The metric and direction of the configured task, without loading anything."""
    if isinstance(config.task, str):
        return KindInfo(TASKS[config.task].metric, TASKS[config.task].direction)
    return config.task.judged_by


def prepare(config: RunConfig) -> PreparedTask:
    """Load the configured task's data and tokenizer; the model is loaded by ``build_model``.

    Raises:
        DataError: a data file is missing or unusable, or a data package is not installed.
        ConfigError: the model or its tokenizer cannot be loaded or does not fit the task.
    """
    module = TASKS[config.task].module if isinstance(config.task, str) else _module_of(config.task.kind)
    prepared = importlib.import_module(f".{module}", __name__).prepare(config)
    if config.data.prior_bias:
        from .prior_bias import with_prior_bias

        return with_prior_bias(prepared)
    return prepared


def _module_of(kind: str) -> str:
    """The file in this folder whose ``prepare`` builds tasks of this kind from the user's data."""
    if kind in MEDIA_KINDS:
        return "media"
    return "language" if kind in LANGUAGE_KINDS and kind != "causal-lm" else "files"


def load_task(name: str = "punctuation", **sets: Any) -> PreparedTask:
    """A named task in one call: data, tokenizer and a recipe for a fresh model.

    Args:
        name: a key of ``TASKS``.
        sets: further settings, by section, such as ``data={"limit_train": 200}``.

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
