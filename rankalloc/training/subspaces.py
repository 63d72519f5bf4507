"""The subspaces that finished adapters read from and write to, in the layers that a model's adapters adapt.

Of each update the row space (what it reads, in R^d_in) or the column space (what it writes, in R^d_out) as an
orthonormal basis; of several adapters the span of all of them together, so that what two share counts once.

Cost: one QR and one r × r SVD a layer and adapter, in float64, when training begins; d · k numbers a layer are kept.
Known weakness: a direction that an adapter hardly uses counts as much as its strongest one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..adapters.adapter_set import Adapters
from ..adapters.triplets import Triplets
from ..errors import AdapterFileError, ConfigError
from ..files import sha256_of
from ..lowrank import Factors, bases
from ..storage import fingerprint
from ..storage.fitting import fit
from ..storage.folder import CONFIG_NAME, WEIGHTS_NAME
from ..storage.reading import FinishedAdapter

SIDES = ("input", "output", "both")
"""Row spaces, column spaces, or both."""

Given = str | os.PathLike | FinishedAdapter


@dataclass(frozen=True)
class Subspaces:
    """Where finished adapters live.

    Attributes:
        rows: {module name: orthonormal basis (d_in, k)}, float32 on the CPU; {} unless asked for.
        columns: the same of column spaces, (d_out, k).
        digests: SHA-256 of each adapter's two files.
        notes: what the user should know, one sentence each.
    """

    rows: dict[str, torch.Tensor]
    columns: dict[str, torch.Tensor]
    digests: list[str]
    notes: list[str] = field(default_factory=list)


def subspaces_of(adapters: Adapters, others: Given | Sequence[Given], side: str = "input") -> Subspaces:
    """The span, layer by layer, of what ``others`` do to the layers that ``adapters`` adapt.

    Args:
        others: folders as for :class:`rankalloc.FinishedAdapter`, or such adapters; layers that one of them has and
            ``adapters`` have not are left out.
        side: one of :data:`SIDES`.

    Raises:
        ConfigError: no adapter is given; one has no layer in common with ``adapters``, or changes nothing in those;
            together they fill the whole space of every layer.
        AdapterFileError: one is damaged, or was made for another base model.
    """
    if isinstance(others, (str, os.PathLike, FinishedAdapter)):
        others = [others]
    if not isinstance(others, Iterable):
        raise ConfigError(f"away_from takes folders of adapters or finished adapters, got {others!r}")
    finished = [other if isinstance(other, FinishedAdapter) else FinishedAdapter(other) for other in others]
    if not finished:
        raise ConfigError("away_from names no adapter to keep away from; give at least one, or leave it out")
    notes = [note for other in finished for note in _check_base(other, adapters)]
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for other in finished:
        common = [name for name in adapters.modules if name in other.layers]
        if not common:
            raise ConfigError(
                f"away_from: {other.label} and these adapters have no layer in common: it adapts "
                f"{next(iter(other.layers))} and these {next(iter(adapters.modules), 'nothing')}; adapt some of the "
                "same layers, or leave it out"
            )
        pairs = {name: bases(_factors(other, name, adapters.modules[name])) for name in common}
        if not any(rows.shape[1] for _, rows in pairs.values()):
            raise ConfigError(
                f"away_from: {other.label} changes none of the layers in common (its ΔW is zero), so there is nothing "
                "to keep away from; leave it out"
            )
        for name, pair in pairs.items():
            found.setdefault(name, []).append(pair)
    columns, rows = ({}, {})
    for name in adapters.modules:
        if name in found:
            columns[name], rows[name] = (_span([pair[i] for pair in found[name]]) for i in (0, 1))
    kept = {
        "input": {} if side == "output" else _with_room(rows, "inputs", notes),
        "output": {} if side == "input" else _with_room(columns, "outputs", notes),
    }
    digests = [
        sha256_of(*((other.folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME))) for other in finished
    ]
    return Subspaces(kept["input"], kept["output"], digests, notes)


def _check_base(other: FinishedAdapter, adapters: Adapters) -> list[str]:
    """Raise AdapterFileError when ``other`` is of another base; a note when nobody can tell and names differ."""
    wanted = fingerprint.named_in(other.metadata, other.folder / WEIGHTS_NAME)
    relation, why = (None, "") if wanted is None else fingerprint.relation(wanted, adapters.model)
    if relation == "another":
        raise AdapterFileError(
            f"away_from: {other.label} was made for another base model: {why}; only adapters of the base that is "
            "trained here have subspaces in it"
        )
    here = fingerprint.name_of(adapters.model)
    if relation is None and here and other.base and here != other.base:
        return [
            f"away_from: {other.label} was made for base model {other.base!r} and carries nothing to compare the "
            f"weights of {here!r} with; its subspaces mean something only if both are one model"
        ]
    return []


def _factors(other: FinishedAdapter, name: str, adapter: Triplets) -> Factors:
    try:
        factors = fit(other, name, adapter.base_layer)
    except AdapterFileError as error:
        raise AdapterFileError(f"away_from: {error}") from None
    rows = factors.Q.clone()
    adapter.layout.blank(adapter.base_layer, rows)  # what must stay zero here is not to be pushed
    return replace(factors, Q=rows)


def _span(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """An orthonormal basis of all ``parts`` (d, k_i) together, (d, k) in float32."""
    if len(parts) == 1:
        return parts[0].float()
    u, sigma, _ = torch.linalg.svd(torch.cat(list(parts), 1), full_matrices=False)
    return u[:, sigma > 1e-6].float()


def _with_room(spans: Mapping[str, torch.Tensor], what: str, notes: list[str]) -> dict[str, torch.Tensor]:
    """The spans that something lies outside of, and that are not empty."""
    full = [name for name, span in spans.items() if span.shape[1] >= span.shape[0]]
    if full and len(full) == sum(span.shape[1] > 0 for span in spans.values()):
        raise ConfigError(
            f"away_from: together the adapters fill the whole space of {what} of every layer in common, so there is "
            "no direction away from them; give fewer, or ones of lower rank"
        )
    if full:
        notes.append(
            f"away_from: together the adapters fill the whole space of {what} of {full[0]} ({len(full)} layers in "
            "all); there is no direction away from them there, and those layers are left alone"
        )
    return {name: span for name, span in spans.items() if span.shape[1] and name not in full}
