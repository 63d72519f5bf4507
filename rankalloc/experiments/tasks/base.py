"""A prepared task, and the evaluation that all tasks share.

A :class:`PreparedTask` holds tokenised splits and builds fresh models. :func:`evaluate` streams over a split:
logits are reduced to losses and predictions batch by batch and never gathered.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from ...errors import ConfigError, unknown
from ...layers.batches import IGNORED, evaluating, on_device
from ...trace import EvaluationRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Features = list[dict[str, Any]]
SPLITS = ("train", "tune", "report")

# Logits held at once by a language model: 2**27 floats are half a gigabyte.
_MOST_LOGITS = 2**27


@dataclass
class PreparedTask:
    """A task ready to train.

    Attributes:
        name: the task's name; for a task from a file, its kind.
        kind: "text-classification", "regression", "token-classification" or "causal-lm".
        model_ref: the argument of ``from_pretrained``: a local folder or a hub id.
        model_name: the model's name in records, without the path of a folder.
        tokenizer: has a padding token.
        splits: "train", "tune" and "report": lists of features (``input_ids``, ``attention_mask``,
            ``labels``, and ``token_type_ids`` where the model takes them), as plain Python numbers.
        collator: features to a padded batch of tensors; labels are padded with -100.
        build_model: returns a fresh model at each call; a missing head is drawn from the global torch seed.
        metric: the key in :attr:`EvaluationRecord.metrics` of the task's metric.
        direction: whether ``metric`` is to be maximised or minimised.
        metrics_of: computes named metrics from predictions and references, both of shape (items,).
        fingerprint: SHA-256 over the texts and labels of all splits, in order.
        labels: class names by class index; empty without classes.
        notes: remarks on the data for the user, one sentence each.
        trainer: what trains it: transformers' own Trainer ("plain"), or TRL's SFTTrainer or DPOTrainer.
        rows: for a preference task, the data set of each split in TRL's columns.
        comparison: how a preference task evaluates; None for all others.
    """

    name: str
    kind: str
    model_ref: str
    model_name: str
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Features]
    collator: Callable[[Features], dict[str, torch.Tensor]]
    build_model: Callable[[], PreTrainedModel]
    metric: str
    direction: Literal["maximize", "minimize"]
    metrics_of: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    fingerprint: str
    labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trainer: Literal["plain", "sft", "dpo"] = "plain"
    rows: dict[str, Any] = field(default_factory=dict)
    comparison: Any = None

    @property
    def streaming(self) -> bool:
        """Whether the train split is read while training goes on, so that its length is not known."""
        return not hasattr(self.splits["train"], "__len__")


def evaluate(prepared: PreparedTask, model: torch.nn.Module, split: str, batch_size: int) -> EvaluationRecord:
    """Losses and metrics of ``model`` on a split, without gradients and without dropout.

    Batches are formed by length (fewer padded positions) and results are in dataset order, so the order of
    evaluation affects only the time. A language model's batch is made smaller where its logits would exceed half
    a gigabyte. Every module's train/eval mode is restored afterwards.

    Args:
        model: returns ``logits`` for the collator's batch; run on the device of its first parameter.
        split: "train", "tune" or "report".
        batch_size: examples in a batch, at most.

    Returns:
        ``metrics`` holds "loss" (mean over examples, or over predicted tokens for token tasks) and the
        task's metrics. ``example_losses`` are mean token cross-entropies in nats, or squared errors;
        None when one of them is not finite.

    Raises:
        ConfigError: there is no such split.
    """
    if split not in prepared.splits:
        raise ConfigError(unknown("split", split, prepared.splits))
    examples = prepared.splits[split]
    device = next(model.parameters()).device
    sums, counts = np.zeros(len(examples)), np.zeros(len(examples))
    predictions: list[np.ndarray] = [np.empty(0)] * len(examples)
    references: list[np.ndarray] = [np.empty(0)] * len(examples)
    extra = {"use_cache": False} if prepared.kind == "causal-lm" else {}

    with evaluating(model), torch.no_grad(), tqdm(
        total=len(examples), desc=f"evaluating {split}", unit="example", leave=False, delay=2,
        disable=not sys.stderr.isatty(),
    ) as progress:
        for rows in _batches(prepared, examples, batch_size):
            batch = on_device(prepared.collator([examples[i] for i in rows]), device)
            labels = batch.pop("labels")
            outcome = _OUTCOMES[prepared.kind](model(**batch, **extra).logits.float(), labels)
            for i, (loss_sum, count, predicted, expected) in zip(rows, outcome, strict=True):
                sums[i], counts[i], predictions[i], references[i] = loss_sum, count, predicted, expected
            progress.update(len(rows))

    loss = float(sums.sum() / max(counts.sum(), 1))
    metrics = {"loss": loss}
    if prepared.kind == "causal-lm":
        metrics["perplexity"] = math.exp(loss) if loss < 700 else math.inf
    else:
        metrics |= prepared.metrics_of(np.concatenate(predictions), np.concatenate(references))
    losses = sums / np.maximum(counts, 1)
    return EvaluationRecord(
        split=split,
        examples=len(examples),
        metrics=metrics,
        example_losses=losses.tolist() if np.isfinite(losses).all() else None,
    )


def _batches(prepared: PreparedTask, examples: Features, batch_size: int) -> list[list[int]]:
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i]["input_ids"]), i))
    if prepared.kind == "causal-lm" and order:
        longest = len(examples[order[0]]["input_ids"])
        batch_size = max(1, min(batch_size, _MOST_LOGITS // (longest * len(prepared.tokenizer))))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


# An outcome is, per example: sum of losses, number of losses, predictions, references.
_Outcome = Sequence[tuple[float, int, np.ndarray, np.ndarray]]


def _of_texts(logits: torch.Tensor, labels: torch.Tensor) -> _Outcome:
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
    predicted, expected = logits.argmax(-1).cpu().numpy(), labels.cpu().numpy()
    return [(loss, 1, predicted[i : i + 1], expected[i : i + 1]) for i, loss in enumerate(losses)]


def _of_numbers(logits: torch.Tensor, labels: torch.Tensor) -> _Outcome:
    predicted, expected = logits.squeeze(-1).double().cpu().numpy(), labels.double().cpu().numpy()
    losses = ((predicted - expected) ** 2).tolist()
    return [(loss, 1, predicted[i : i + 1], expected[i : i + 1]) for i, loss in enumerate(losses)]


def _of_words(logits: torch.Tensor, labels: torch.Tensor) -> _Outcome:
    losses = _token_losses(logits, labels)
    predicted, kept = logits.argmax(-1), labels != IGNORED
    return [
        (losses[i][kept[i]].sum().item(), int(kept[i].sum()), predicted[i][kept[i]].cpu().numpy(),
         labels[i][kept[i]].cpu().numpy())
        for i in range(len(labels))
    ]  # fmt: skip


def _of_next_tokens(logits: torch.Tensor, labels: torch.Tensor) -> _Outcome:
    logits, labels = logits[:, :-1], labels[:, 1:]
    losses, kept, nothing = _token_losses(logits, labels), labels != IGNORED, np.empty(0)
    return [(losses[i][kept[i]].sum().item(), int(kept[i].sum()), nothing, nothing) for i in range(len(labels))]


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    flat = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return flat.reshape(labels.shape).double()


_OUTCOMES: dict[str, Callable[[torch.Tensor, torch.Tensor], _Outcome]] = {
    "text-classification": _of_texts,
    "regression": _of_numbers,
    "token-classification": _of_words,
    "causal-lm": _of_next_tokens,
}
