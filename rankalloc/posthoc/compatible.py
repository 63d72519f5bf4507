"""Checks that adapters can be composed: one base, the same layers, heads that agree."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ..errors import AdapterFileError, ConfigError, unknown
from ..storage import fingerprint
from ..storage.folder import WEIGHTS_NAME, Heads
from ..storage.reading import FinishedAdapter

HEADS = ("equal", "first", "average", "none")
MISSING = ("error", "zero")


def require_composable(
    adapters: Sequence[FinishedAdapter], missing: str = "error", same_base: bool = False
) -> None:
    """Make sure that all adapters are of one base model and adapt the same layers; see :func:`rankalloc.compose`.

    Raises:
        AdapterFileError: they are of different bases, or adapt different layers, or layers of different shapes.
        ConfigError: ``missing`` is unknown.
    """
    if missing not in MISSING:
        raise ConfigError(unknown("missing", missing, MISSING))
    first = adapters[0]
    for other in adapters[1:]:
        theirs, ours = (fingerprint.named_in(a.metadata, a.folder / WEIGHTS_NAME) for a in (other, first))
        relation, why = (None, "") if theirs is None or ours is None else fingerprint.relate(theirs, ours)
        if relation == "another" and not same_base:
            raise AdapterFileError(
                f"{other.folder} and {first.folder} are of different bases: {why}; only adapters of one base can be "
                "composed (if you know that it is one, pass same_base=True)"
            )
        # a base can be a path on one machine and an address on another, so weights that agree count for more
        if relation is None and not same_base and first.base and other.base and first.base != other.base:
            raise AdapterFileError(
                f"{other.folder} was made for base model {other.base!r} and {first.folder} for {first.base!r}; only "
                "adapters of one base can be composed (if both names mean one model, pass same_base=True)"
            )
        if bool(first.config.get("fan_in_fan_out")) != bool(other.config.get("fan_in_fan_out")):
            raise AdapterFileError(
                f"{other.folder} and {first.folder} are of different bases: they differ in fan_in_fan_out"
            )
        # a layer that holds nothing but zeros is one without ranks, which the compact layout leaves out
        unlike = [
            name for name in sorted(first.layers.keys() ^ other.layers.keys())
            if (first if name in first.layers else other).factors(name).rank
        ]
        if unlike and missing == "error":
            has, lacks = (first, other) if unlike[0] in first.layers else (other, first)
            raise AdapterFileError(
                f"{has.folder} adapts {unlike[0]} and {lacks.folder} does not ({len(unlike)} such layers); to count "
                "a missing layer as no change, pass missing='zero'"
            )
        for name in [name for name in first.layers if name in other.layers]:
            one, two = first.layers[name], other.layers[name]
            if (one.d_in, one.d_out) != (two.d_in, two.d_out):
                raise AdapterFileError(
                    f"{other.folder} and {first.folder} are of different bases: {name} is {two.d_in} → {two.d_out} in "
                    f"the first and {one.d_in} → {one.d_out} in the second"
                )


def common_heads(adapters: Sequence[FinishedAdapter], heads: str) -> Heads:
    """The task heads of the composed adapter; see :func:`rankalloc.compose`.

    Raises:
        AdapterFileError: they differ although they must be equal, or cannot be averaged.
        ConfigError: ``heads`` is unknown.
    """
    if heads not in HEADS:
        raise ConfigError(unknown("heads", heads, HEADS))
    if heads == "none":
        return {}
    first = adapters[0]
    if heads != "first":
        for other in adapters[1:]:
            odd = sorted(first.heads.keys() ^ other.heads.keys()) or [
                name for name in first.heads
                if first.spec(name) != other.spec(name)
                or heads == "equal" and not torch.equal(first.head(name), other.head(name))
            ]
            if odd:
                raise AdapterFileError(
                    f"the task heads of {first.folder} and {other.folder} differ ({odd[0]}); pass heads='first' "
                    "(--heads first) to keep those of the first, 'average' for their mean (of equal shapes), or 'none' "
                    "to leave them out"
                )

    def mean(name: str) -> torch.Tensor:
        values = [adapter.head(name) for adapter in adapters]
        average = torch.stack([value.double() for value in values]).mean(0)
        return average.to(values[0].dtype) if values[0].is_floating_point() else values[0]

    value = mean if heads == "average" else first.head
    return {name: (first.spec(name), partial(value, name)) for name in first.heads}
