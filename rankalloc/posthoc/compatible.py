"""Whether adapters can be composed: one base, the same layers, heads that agree. Each refusal names the way out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import AdapterFileError, ConfigError, unknown
from ..storage import fingerprint
from ..storage.folder import WEIGHTS_NAME
from ..storage.reading import FinishedAdapter
from ..storage.tensors import Spec

HEADS = ("equal", "first", "average", "none")
MISSING = ("error", "zero")
Heads = dict[str, tuple[Spec, Callable[[], torch.Tensor]]]


def check_same(adapters: Sequence[FinishedAdapter], missing: str = "error", same_base: bool = False) -> None:
    """Whether all are of one base model.

    Raises:
        AdapterFileError: they name different bases, adapt different layers, or layers of different shapes.
        ConfigError: ``missing`` is unknown.
    """
    if missing not in MISSING:
        raise ConfigError(unknown("missing", missing, MISSING))
    first = adapters[0]
    for other in adapters[1:]:
        bases = [fingerprint.read(adapter.folder / WEIGHTS_NAME) for adapter in (other, first)]
        relation, why = fingerprint.relate(*bases) if all(bases) else (None, "")
        if relation == "another" and not same_base:
            raise AdapterFileError(
                f"{other.folder} and {first.folder} are of unlike bases: {why}; only adapters of one base can be "
                "composed (if you know better, say same_base=True)"
            )
        # a name is a path on one machine and an address on another: weights that agree say more
        if relation is None and not same_base and first.base and other.base and first.base != other.base:
            raise AdapterFileError(
                f"{other.folder} was made for base model {other.base!r} and {first.folder} for {first.base!r}; only "
                "adapters of one base can be composed (if both names mean one model, say same_base=True)"
            )
        if bool(first.config.get("fan_in_fan_out")) != bool(other.config.get("fan_in_fan_out")):
            raise AdapterFileError(
                f"{other.folder} and {first.folder} are of unlike bases: they differ in fan_in_fan_out"
            )
        unlike = sorted(first.layers.keys() ^ other.layers.keys())
        if unlike and missing == "error":
            has, lacks = (first, other) if unlike[0] in first.layers else (other, first)
            raise AdapterFileError(
                f"{has.folder} adapts {unlike[0]} and {lacks.folder} does not ({len(unlike)} such layers); to count "
                "a missing layer as no change, say missing='zero'"
            )
        for name in [name for name in first.layers if name in other.layers]:
            one, two = first.layers[name], other.layers[name]
            if (one.d_in, one.d_out) != (two.d_in, two.d_out):
                raise AdapterFileError(
                    f"{other.folder} and {first.folder} are of unlike bases: {name} is {two.d_in} → {two.d_out} in the "
                    f"one and {one.d_in} → {one.d_out} in the other"
                )


def common_heads(adapters: Sequence[FinishedAdapter], heads: str) -> Heads:
    """The task heads of the composed adapter; see :func:`rankalloc.compose`.

    Raises:
        AdapterFileError: they differ and are to be equal, or cannot be averaged.
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
                    f"the task heads of {first.folder} and {other.folder} differ ({odd[0]}); say heads='first' "
                    "(--heads first) to keep the first one's, 'average' for their mean (of equal shapes), or 'none' to "
                    "leave them out"
                )

    def mean(name: str) -> torch.Tensor:
        values = [adapter.head(name) for adapter in adapters]
        average = torch.stack([value.double() for value in values]).mean(0)
        return average.to(values[0].dtype) if values[0].is_floating_point() else values[0]

    value = mean if heads == "average" else first.head
    return {name: (first.spec(name), lambda name=name: value(name)) for name in first.heads}
