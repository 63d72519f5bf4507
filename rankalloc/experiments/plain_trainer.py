"""transformers' Trainer with the loss of one process, whatever the number of processes and of accumulated batches.

The Trainer counts the labels of a whole optimizer step, hands the number to the model, and from then on takes the
loss for a sum divided by it: it neither divides by the accumulation steps nor undoes its product with the number of
processes. BERT's classification heads, T5 and many others take the number and return the mean over their own batch all
the same, so that loss and gradient come out as many times too large as a step has batches.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from ..layers.batches import IGNORED, evaluating, on_device


class PlainTrainer(Trainer):
    """A Trainer whose step has the mean loss over all its labels.

    Args:
        example: a batch of the train split, by which a model is known that takes no notice of the number of labels.
    """

    def __init__(self, *args: Any, example: dict[str, torch.Tensor], **named: Any) -> None:
        super().__init__(*args, **named)
        self.weighs_batches = self.model_accepts_loss_kwargs and _is_mean_of_its_batch(self.model, example)
        if self.weighs_batches and example["labels"].is_floating_point():
            # examples have equally many values, so that the mean of the batches' means is right
            self.model_accepts_loss_kwargs = self.weighs_batches = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch; where the model's is the mean over the batch, weighed by its share of the step."""
        labels = inputs["labels"]
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.weighs_batches or num_items_in_batch is None:
            return found
        counted = labels[..., 1:] if self._loss_shifts_labels else labels  # as the Trainer counted them
        share = counted.ne(IGNORED).sum() / num_items_in_batch
        loss = found[0] if isinstance(found, tuple) else found
        loss = torch.where(share > 0, loss, torch.zeros_like(loss)) * share  # a batch without labels has no mean
        return (loss, *found[1:]) if isinstance(found, tuple) else loss


@torch.no_grad()
def _is_mean_of_its_batch(model: Any, example: dict[str, torch.Tensor]) -> bool:
    """Whether the model's loss is the same whatever number of labels it is told."""
    batch = on_device(example, next(model.parameters()).device)
    with evaluating(model):
        once, twice = (model(**batch, num_items_in_batch=torch.tensor(count))["loss"] for count in (1, 2))
    return bool(torch.allclose(once, twice, rtol=0, atol=0, equal_nan=True))
