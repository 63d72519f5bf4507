"""How far a model prefers chosen answers to rejected ones, compared with the model that it was before.

    margin = β (log π(chosen) − log π₀(chosen) − log π(rejected) + log π₀(rejected))       loss = −log σ(margin)

over the answers' tokens (DPO: Rafailov et al. 2023, arXiv 2305.18290, equation 7). π₀ is the untouched base, whose
log-probabilities are computed once for each split: two numbers a pair are kept of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...layers.batches import IGNORED, evaluating, on_device
from ...trace import EvaluationRecord
from .base import SPLITS, Features, batches_of, progress_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Preferences:
    """The evaluation of a preference task; see :class:`~rankalloc.experiments.tasks.base.Comparison`.

    Args:
        splits: features with ``input_ids`` and ``labels`` of prompt and chosen answer, and ``rejected_*`` of the other.
        build_model: a fresh base, for an evaluation of a model that was not remembered.
        beta: DPO's.
    """

    def __init__(
        self, splits: dict[str, Features], tokenizer: Any, build_model: Callable[[], PreTrainedModel], beta: float
    ) -> None:
        self.splits, self.tokenizer, self.build_model, self.beta = splits, tokenizer, build_model, beta
        self._references: dict[str, np.ndarray] = {}

    def remember(self, model: torch.nn.Module, batch_size: int = 8) -> None:
        """Keep what ``model`` gives the answers of "tune" and "report", before anything is attached to it."""
        for split in SPLITS[1:]:
            if split not in self._references:
                self._references[split] = self._log_probabilities(model, split, batch_size)

    def __call__(self, model: torch.nn.Module, split: str, batch_size: int) -> EvaluationRecord:
        """"loss", "reward_accuracy" (the share of pairs of a margin above 0) and "reward_margin" (the mean)."""
        if split not in self._references:
            with torch.random.fork_rng():
                base: Any = self.build_model()
            if not getattr(base, "is_quantized", False):  # which stays where it was loaded
                base = base.to(next(model.parameters()).device)
            self._references[split] = self._log_probabilities(base, split, batch_size)
        gained = self._log_probabilities(model, split, batch_size) - self._references[split]
        margins = self.beta * (gained[:, 0] - gained[:, 1])
        losses = np.logaddexp(0, -margins)
        return EvaluationRecord(
            split=split,
            examples=len(margins),
            metrics={
                "loss": float(losses.mean()), "reward_accuracy": float((margins > 0).mean()),
                "reward_margin": float(margins.mean()),
            },
            example_losses=losses.tolist() if np.isfinite(losses).all() else None,
        )  # fmt: skip

    def _log_probabilities(self, model: torch.nn.Module, split: str, batch_size: int) -> np.ndarray:
        """Log-probabilities in nats of the chosen and the rejected answers, (pairs, 2) float64."""
        examples = self.splits[split]
        found = np.zeros((len(examples), 2))
        device = next(model.parameters()).device
        with evaluating(model), torch.no_grad(), progress_of(split, len(examples)) as progress:
            for side, prefix in enumerate(("", "rejected_")):
                sides = [
                    {"input_ids": one[f"{prefix}input_ids"], "labels": one[f"{prefix}labels"]} for one in examples
                ]
                for rows in batches_of("preference", self.tokenizer, sides, batch_size):
                    ids, mask, labels = on_device(self._padded([sides[i] for i in rows]), device)
                    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
                    kept = labels[:, 1:] != IGNORED
                    taken = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
                    found[rows, side] = (taken.double() * kept).sum(-1).cpu().numpy()
                    progress.update(len(rows) / 2)
        return found

    def _padded(self, sides: Features) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        longest = max(len(one["input_ids"]) for one in sides)

        def filled(name: str, value: int) -> torch.Tensor:
            return torch.tensor([one[name] + [value] * (longest - len(one[name])) for one in sides])

        ids = filled("input_ids", self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(one["input_ids"]) for one in sides])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return ids, mask, filled("labels", IGNORED)
