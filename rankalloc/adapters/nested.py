"""Using nested adapters, which methods "dylora" and "matryoshka" train, at a lower rank than they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ..errors import ConfigError, RankallocError, unknown
from ..options import integer
from .adapter_set import Adapters


@contextmanager
def at_rank(adapters: Adapters, rank: int | Mapping[str, int]) -> Iterator[Adapters]:
    """Cut ``adapters`` to their first ``rank`` triplets, at the scale of that rank, inside a with block.

    Evaluating, saving or merging inside the block uses the smaller adapter; afterwards all ranks are back.

    Args:
        adapters: nested ones: trained by method "dylora" or "matryoshka", or loaded from what such a run saved. The
            first triplets of any others are not an adapter.
        rank: for every layer, or {module name: rank}; a layer of a lower rank keeps all it has.

    Raises:
        ConfigError: a rank is not a whole number of at least 0, or is higher than any layer was trained at; a name is
            not that of an adapter.
        RankallocError: the adapters are not nested.

    Example:
        >>> import torch, rankalloc as ra
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> adapters = ra.attach(model, rank=4, init="lora")
        >>> controller = ra.RankController(adapters, ra.RankBudget(fraction=1.0), 100, "dylora")
        >>> with ra.at_rank(adapters, 2):
        ...     adapters.ranks()
        {'0': 2}
        >>> adapters.ranks()
        {'0': 4}
    """
    if not adapters.nested:
        raise RankallocError(
            "only nested adapters can be cut from the end: train with method='dylora' or 'matryoshka' on adapters "
            "attached with init='lora', or load what such a run saved"
        )
    wanted = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(adapters.modules, rank)
    for name, value in wanted.items():
        if name not in adapters.modules:
            raise ConfigError(unknown("layer in rank=", name, adapters.modules))
        wanted[name] = integer("rank", value, 0)
    most = max((adapter.initial_rank for adapter in adapters), default=0)
    if wanted and min(wanted.values()) > most:
        raise ConfigError(f"rank {min(wanted.values())} is more than any layer was trained at, at most {most}")
    before = [(adapter.kept.clone(), adapter.lam.detach().clone()) for adapter in adapters]
    try:
        with torch.no_grad():
            for name, value in wanted.items():
                adapter = adapters.modules[name]
                whole = adapter.live_rank
                live = min(value, whole)
                adapter.kept.copy_(adapter.kept & (torch.arange(adapter.rank, device=adapter.kept.device) < live))
                adapter.lam.mul_(adapter.kept * (max(1, whole) / max(1, live)) ** adapters.cut_exponent)
        yield adapters
    finally:
        with torch.no_grad():
            for adapter, (kept, lam) in zip(adapters, before, strict=True):
                adapter.kept.copy_(kept)
                adapter.lam.copy_(lam)
