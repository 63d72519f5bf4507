"""What the gates of a mixture give to the adapters, over the calls of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..adapters.mixed import Gated
from ..errors import ConfigError
from ..layers.batches import evaluating, on_device


@contextmanager
def watching(gated: Mapping[str, Gated]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """The gates (…, K) of every call inside, by the names in ``gated``."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in gated}
    for name, layer in gated.items():
        layer.seen = found[name].append
    try:
        yield found
    finally:
        for layer in gated.values():
            layer.seen = None


@torch.no_grad()
def mean_over(
    model: nn.Module, seen: Mapping[str, list[torch.Tensor]], count: int, batches: Iterable[Any]
) -> dict[str, torch.Tensor]:
    """The mean gates (K,) of each name over ``batches``, in float64; positions that are masked have no vote.

    Args:
        seen: what :func:`watching` fills while the model is called.
        count: K.

    Raises:
        ConfigError: there are no batches.
    """
    device = next(model.parameters()).device
    sums = {name: torch.zeros(count, dtype=torch.float64) for name in seen}
    votes = dict.fromkeys(sums, 0)
    with evaluating(model):
        for batch in batches:
            batch = on_device(batch, device)
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch)
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            for name, calls in seen.items():
                for gates in calls:
                    voting = gates[mask.bool()] if mask is not None and gates.shape[:-1] == mask.shape else gates
                    sums[name] += voting.reshape(-1, count).double().sum(0).cpu()
                    votes[name] += voting.numel() // count
                calls.clear()
    if not any(votes.values()):
        raise ConfigError("mean_gates needs at least one batch")
    return {name: total / max(1, votes[name]) for name, total in sums.items()}
