"""A new classifier's bias, set to the classes' log frequencies before the first step.

    b_c = log((n_c + 1) / (n + C))          n_c of n training labels are of class c, of C

With b = 0 a run first learns the class frequencies. Where most words are of one class, the adapters can learn them
instead of the bias: every input then gives the same features, and some runs never leave that state (on punctuation,
seed and warm-up decided which). This is the prior of Lin et al. (2017, arXiv 1708.02002, section 4.1), for every
class instead of one.

Weakness: useful only where frequencies are unequal. A head that is already trained is not changed.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ...errors import ConfigError
from ...layers.batches import IGNORED
from ...layers.targets import find_heads
from .base import PreparedTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_prior_bias(prepared: PreparedTask) -> PreparedTask:
    """``prepared``, with models whose classifier bias is the training split's log frequencies.

    Raises:
        ConfigError: the task has no classes; or, from ``build_model``, the classifier has no bias.
    """
    if not prepared.labels:
        raise ConfigError(f"data.prior_bias needs a task with classes, and {prepared.name!r} has none; leave it out")
    bias = torch.from_numpy(log_frequencies(prepared))

    def build() -> PreTrainedModel:
        model = prepared.build_model()
        last = _last_layer(model, len(bias))
        if last is None:
            raise ConfigError("data.prior_bias found no classifier with a bias for each class; leave it out")
        if not last.bias.any():  # a bias that is not zero was trained
            with torch.no_grad():
                last.bias.copy_(bias)
        return model

    return dataclasses.replace(prepared, build_model=build)


def log_frequencies(prepared: PreparedTask) -> np.ndarray:
    """log((n_c + 1) / (n + C)) of the training labels, (C,) float64."""
    labels = np.concatenate([np.atleast_1d(example["labels"]) for example in prepared.splits["train"]])
    counts = np.bincount(labels[labels != IGNORED].astype(np.int64), minlength=len(prepared.labels))
    return np.log((counts + 1) / (counts.sum() + len(counts)))


def _last_layer(model: nn.Module, classes: int) -> nn.Linear | None:
    """The linear layer of a task head that gives the logits."""
    heads = [model.get_submodule(name) for name in find_heads(model)]
    layers = [m for head in heads for m in head.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    return layers[-1] if layers and layers[-1].bias is not None else None
