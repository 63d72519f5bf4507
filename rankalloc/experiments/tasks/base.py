"""A prepared task, and the evaluation that all tasks share.

A :class:`PreparedTask` holds tokenised splits and builds fresh models. :func:`evaluate` streams over a split:
logits are reduced to losses and predictions batch by batch and never gathered.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from tqdm import tqdm

from ...errors import ConfigError, unknown
from ...layers.batches import evaluating, on_device
from ...trace import EvaluationRecord
from ..task_names import DECODER_KINDS, LANGUAGE_KINDS, MEDIA_KINDS, Direction
from .outcomes import OUTCOMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Features = Sequence[dict[str, Any]]
SPLITS = ("train", "tune", "report")

# Logits held at once by a language model: 2**27 floats are half a gigabyte.
_MOST_LOGITS = 2**27


class Comparison(Protocol):
    """An evaluation that sets a model beside the one it was before it was adapted."""

    def remember(self, model: torch.nn.Module) -> None:
        """Take ``model`` as the one to compare with; call it before anything is attached to it."""

    def __call__(self, model: torch.nn.Module, split: str, batch_size: int) -> EvaluationRecord:
        """The quality of ``model`` on a split."""


@dataclass
class PreparedTask:
    """A task ready to train.

    Attributes:
        name: the task's name; for a task from a file, its kind.
        kind: a key of :data:`~rankalloc.experiments.task_names.TASK_KINDS`.
        model_ref: the argument of ``from_pretrained``: a local folder or a hub id.
        model_name: the model's name in records, without the path of a folder.
        tokenizer: has a padding token; for images and audio their processor.
        splits: "train", "tune" and "report": sequences of features, as plain Python numbers: ``input_ids``,
            ``attention_mask``, ``labels`` (-100 where nothing is learnt), and ``token_type_ids`` where the model takes
            them. A train split that is streamed is an iterable data set of the same features. Those of a preference
            task are of prompt and chosen answer, with ``rejected_input_ids`` and ``rejected_labels`` beside them. For
            images and audio each is decoded, as tensors, when it is asked for.
        collator: features to a padded batch of tensors, as the model takes it; labels are padded with -100. Of a
            preference task's, the batch is that of the chosen answers.
        build_model: returns a fresh model at each call; a missing head is drawn from the global torch seed.
        metric: the key in :attr:`EvaluationRecord.metrics` of the task's metric.
        direction: whether ``metric`` is to be maximised or minimised.
        metrics_of: computes named metrics from predictions and references, both of shape (items,).
        fingerprint: SHA-256 over the texts and labels of all splits, in order.
        labels: class names by class index; empty without classes.
        notes: remarks on the data for the user, one sentence each.
        trainer: what trains it: transformers' own Trainer ("plain"), or TRL's SFTTrainer or DPOTrainer.
        rows: for a preference task, the data set of each split in TRL's columns.
        generated_metrics: further metrics, by generation, of a model on a split in batches of some size; None where
            the task asks for none.
        comparison: how a preference task evaluates; None for all others. Where ``comparison.remember`` was not called
            with the model before it was adapted, a fresh one is built for the time of the first evaluation.
    """

    name: str
    kind: str
    model_ref: str
    model_name: str
    tokenizer: Any
    splits: dict[str, Any]
    collator: Callable[[Any], dict[str, torch.Tensor]]
    build_model: Callable[[], PreTrainedModel]
    metric: str
    direction: Direction
    metrics_of: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    fingerprint: str
    labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trainer: Literal["plain", "sft", "dpo"] = "plain"
    rows: dict[str, Any] = field(default_factory=dict)
    generated_metrics: Callable[[torch.nn.Module, str, int], dict[str, float]] | None = None
    comparison: Comparison | None = None

    @property
    def streaming(self) -> bool:
        """Whether the train split is read while training goes on, so that its length is not known."""
        return not hasattr(self.splits["train"], "__len__")

    @property
    def train_examples(self) -> int | None:
        """How many examples the train split has; None where it is streamed."""
        return None if self.streaming else len(self.splits["train"])


def base_of(prepared: PreparedTask) -> PreTrainedModel:
    """A fresh model, which a task that compares with the base has seen before anything is attached."""
    model = prepared.build_model()
    if prepared.comparison is not None:
        prepared.comparison.remember(model)
    return model


def evaluate(
    prepared: PreparedTask, model: torch.nn.Module, split: str, batch_size: int, blocks: int = 0
) -> EvaluationRecord:
    """Losses and metrics of ``model`` on a split, without gradients and without dropout.

    Batches are formed by length (fewer padded positions) and results are in dataset order, so the order of
    evaluation affects only the time. A language model's batch is made smaller where its logits would exceed half
    a gigabyte. Every module's train/eval mode is restored afterwards.

    Args:
        model: returns ``logits`` for the collator's batch; run on the device of its first parameter.
        split: "train", "tune" or "report"; a train split that is streamed cannot be evaluated.
        batch_size: examples in a batch, at most.
        blocks: of neighbouring examples, in as many of which the split is divided for
            :attr:`EvaluationRecord.metric_blocks`; 0 for none.

    Returns:
        ``metrics`` holds "loss" (mean over examples, or over predicted tokens for token tasks) and the
        task's metrics; for kinds that write text "perplexity" and "token_accuracy" (over predicted tokens), and what
        is scored by generation where the task asks for it. ``example_losses`` are mean token cross-entropies in
        nats, DPO losses, or squared errors; None when one of them is not finite.

    Raises:
        ConfigError: there is no such split, or it is streamed.
        DataError: the user's own metric fails on the texts.
    """
    if split not in prepared.splits:
        raise ConfigError(unknown("split", split, prepared.splits))
    if split == "train" and prepared.streaming:
        raise ConfigError("a train split that is streamed has no end to evaluate to; choose tune or report")
    if prepared.comparison is not None:
        return prepared.comparison(model, split, batch_size)
    examples = prepared.splits[split]
    device = next(model.parameters()).device
    sums, counts = np.zeros(len(examples)), np.zeros(len(examples))
    predictions: list[np.ndarray] = [np.empty(0)] * len(examples)
    references: list[np.ndarray] = [np.empty(0)] * len(examples)
    extra = {"use_cache": False} if prepared.kind in LANGUAGE_KINDS else {}

    with evaluating(model), torch.no_grad(), progress_of(split, len(examples)) as progress:
        for rows in batches_of(prepared.kind, prepared.tokenizer, examples, batch_size):
            batch = on_device(prepared.collator([examples[i] for i in rows]), device)
            labels = batch.pop("labels")
            if prepared.kind == "seq2seq":  # a model that gets no labels does not shift them
                extra["labels"] = labels
            outcome = OUTCOMES[prepared.kind](model(**batch, **extra).logits.float(), labels)
            for i, (loss_sum, count, predicted, expected) in zip(rows, outcome, strict=True):
                sums[i], counts[i], predictions[i], references[i] = loss_sum, count, predicted, expected
            progress.update(len(rows))

    loss = float(sums.sum() / max(counts.sum(), 1))
    metrics = {"loss": loss} | prepared.metrics_of(np.concatenate(predictions), np.concatenate(references))
    if prepared.kind in LANGUAGE_KINDS:
        metrics["perplexity"] = math.exp(loss) if loss < 700 else math.inf
    if prepared.generated_metrics is not None:
        metrics |= prepared.generated_metrics(model, split, batch_size)
    losses = sums / np.maximum(counts, 1)

    def without(left_out: np.ndarray) -> float:
        """The task's metric over all but the examples of these numbers."""
        kept = np.delete(np.arange(len(examples)), left_out)
        if prepared.metric == "loss":
            return float(sums[kept].sum() / max(counts[kept].sum(), 1))
        return prepared.metrics_of(
            np.concatenate([predictions[i] for i in kept]), np.concatenate([references[i] for i in kept])
        )[prepared.metric]

    shares = None
    if blocks > 1 and len(examples) > blocks and prepared.metric in metrics and prepared.generated_metrics is None:
        parts = np.array_split(np.arange(len(examples)), blocks)
        shares = [blocks * metrics[prepared.metric] - (blocks - 1) * without(part) for part in parts]
    return EvaluationRecord(
        split=split,
        examples=len(examples),
        metrics=metrics,
        example_losses=losses.tolist() if np.isfinite(losses).all() else None,
        metric_blocks=shares if shares is not None and np.isfinite(shares).all() else None,
    )


def progress_of(split: str, examples: int) -> tqdm:
    """A progress bar that shows itself on a terminal after two seconds."""
    return tqdm(
        total=examples, desc=f"evaluating {split}", unit="example", leave=False, delay=2,
        disable=not sys.stderr.isatty(),
    )  # fmt: skip


def batches_of(kind: str, tokenizer: Any, examples: Features, batch_size: int) -> list[list[int]]:
    """The examples' numbers in batches: long ones first, and as many as their logits have room for."""
    if kind in MEDIA_KINDS:  # all of one size, and to look at one is to decode it
        order = list(range(len(examples)))
    else:
        order = sorted(range(len(examples)), key=lambda i: (-len(examples[i]["input_ids"]), i))
    if kind in DECODER_KINDS and order:
        longest = len(examples[order[0]]["input_ids"])
        batch_size = max(1, min(batch_size, _MOST_LOGITS // (longest * len(tokenizer))))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
