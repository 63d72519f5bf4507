"""What a batch's logits amount to, example by example: the losses and the predictions.

Each function takes logits (batch, ...) and labels of the same batch, and returns per example: the sum of its losses in
nats (or squared errors), the number of losses, the predictions and the references, both of shape (items,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ...layers.batches import IGNORED

Outcome = Sequence[tuple[float, int, np.ndarray, np.ndarray]]


def _of_texts(logits: torch.Tensor, labels: torch.Tensor) -> Outcome:
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
    predicted, expected = logits.argmax(-1).cpu().numpy(), labels.cpu().numpy()
    return [(loss, 1, predicted[i : i + 1], expected[i : i + 1]) for i, loss in enumerate(losses)]


def _of_numbers(logits: torch.Tensor, labels: torch.Tensor) -> Outcome:
    predicted, expected = logits.squeeze(-1).double().cpu().numpy(), labels.double().cpu().numpy()
    losses = ((predicted - expected) ** 2).tolist()
    return [(loss, 1, predicted[i : i + 1], expected[i : i + 1]) for i, loss in enumerate(losses)]


def _of_words(logits: torch.Tensor, labels: torch.Tensor) -> Outcome:
    losses = _token_losses(logits, labels)
    predicted, kept = logits.argmax(-1), labels != IGNORED
    return [
        (losses[i][kept[i]].sum().item(), int(kept[i].sum()), predicted[i][kept[i]].cpu().numpy(),
         labels[i][kept[i]].cpu().numpy())
        for i in range(len(labels))
    ]  # fmt: skip


def _of_next_tokens(logits: torch.Tensor, labels: torch.Tensor) -> Outcome:
    return _of_words(logits[:, :-1], labels[:, 1:])


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    flat = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return flat.reshape(labels.shape).double()


OUTCOMES: dict[str, Callable[[torch.Tensor, torch.Tensor], Outcome]] = {
    "text-classification": _of_texts,
    "image-classification": _of_texts,
    "audio-classification": _of_texts,
    "regression": _of_numbers,
    "token-classification": _of_words,
    "seq2seq": _of_words,
    "causal-lm": _of_next_tokens,
    "chat": _of_next_tokens,
    "prompt-completion": _of_next_tokens,
}
"""By kind of task."""
