"""What a finished adapter is, without data and without its model: ranks, spectra, what a budget would keep, readers.

The curve is that of :func:`rankalloc.shrink`: triplets of all layers in falling σ² per parameter, each point the error
of the file that shrink would write. It speaks of weights and not of quality: for that there is the frontier.

Cost: one pass over the file, O((d_in + d_out) r²) per layer, and the memory of a few layers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import AdapterFileError
from ..layer_names import places
from ..lowrank import Factors, effective_rank_of
from ..storage import key_names
from ..storage.folder import NESTED_KEY
from ..storage.plain_lora import groups_of
from ..storage.reader_facts import verdicts
from ..storage.readers import Verdict
from ..storage.reading import FinishedAdapter
from ..storage.tensors import read_tensors
from .interference import interference_of
from .truncation import spectra_of

KEEPING = (0.99, 0.95, 0.9, 0.75)
"""Shares of ‖ΔW‖_F whose budgets are told."""

_POINTS = 64


@dataclass(frozen=True)
class CheckedLayer:
    """One layer of an adapter.

    Attributes:
        role, block: where it stands in the model (:func:`rankalloc.layer_names.places`).
        rank: in the file, zero padding included.
        used: singular values that are not rounding: what rank it needs.
        effective: exp of the entropy of σ / Σσ; 0 for an update of zero.
        norm: ‖ΔW‖_F.
        share: of the squared norm of all layers.
    """

    name: str
    role: str
    block: int | None
    d_in: int
    d_out: int
    rank: int
    used: int
    effective: float
    norm: float
    share: float


@dataclass
class Check:
    """What :func:`rankalloc.check` found.

    Attributes:
        path: the folder or file.
        kind: "LoRA" or "AdaLoRA", and of which form, for people.
        base: the name of the base model; None where the file does not say.
        dtype: of the factors.
        layers: one by one, in natural order.
        stored: numbers in the pairs of factors, zero padding included.
        params: numbers of the ranks that are used: what it takes without any loss.
        heads: {tensor that was stored whole: its numbers}.
        bytes: of the weights file.
        curve: (parameters, share of ‖ΔW‖_F that the best choice of so many keeps), rising.
        keeping: {share of ‖ΔW‖_F: the fewest parameters that keep it}.
        readers: what each tool makes of the folder; empty for a single file.
        alerts: what people should know, one sentence each.
        interference: of several adapters: one row a pair, with means over the layers that both have.
    """

    path: Path
    kind: str
    base: str | None
    dtype: str
    layers: list[CheckedLayer]
    stored: int
    params: int
    heads: dict[str, int]
    bytes: int
    curve: list[tuple[int, float]]
    keeping: dict[float, int]
    readers: list[Verdict]
    alerts: list[str]
    interference: list[dict[str, Any]] = field(default_factory=list)

    def kept(self, params: int) -> float:
        """The share of ‖ΔW‖_F that a budget of so many parameters keeps, by the curve."""
        return max((kept for cost, kept in self.curve if cost <= params), default=0.0)

    def record(self) -> dict[str, Any]:
        """The record as plain values for JSON."""
        return {**asdict(self), "path": str(self.path)}


def check(
    adapter: str | os.PathLike | FinishedAdapter, *others: str | os.PathLike | FinishedAdapter
) -> Check:
    """Look at a finished adapter: no data, no model, seconds.

    Args:
        adapter: a folder with a PEFT LoRA or AdaLoRA or of a run, or a ``.safetensors`` file of kohya's or diffusers'.
        others: further adapters of the same base, whose interference with it and each other is told.

    Raises:
        AdapterFileError: the adapter is damaged, of a type that is not supported, or holds weights that are not finite.

    Example:
        >>> import tempfile, torch, rankalloc as ra
        >>> adapters = ra.attach(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), rank=4, init="lora")
        >>> for adapter in adapters:
        ...     _ = torch.nn.init.normal_(adapter.P[:, :2])
        >>> found = ra.check(ra.save(adapters, tempfile.mkdtemp()))
        >>> found.stored, found.params, [layer.used for layer in found.layers], round(found.kept(found.params), 6)
        (128, 64, [2, 2], 1.0)
    """
    source = _open(adapter)
    found = _checked(source)
    if others:
        sources = [source, *map(_open, others)]
        found.interference = _interference(sources)
    return found


class Checked:
    """An adapter as a source of factors, convolutions as matrices."""

    def __init__(self, path: Path, what: str, parts: Mapping[str, Any]) -> None:
        self.path, self.label = path, what
        self.layers: Mapping[str, Any] = parts

    def stored(self, name: str) -> Factors:
        """The factors of one layer."""
        return self.layers[name].factors()


@dataclass(frozen=True)
class _Part:
    """One layer, of a folder or of a file."""

    d_in: int
    d_out: int
    rank: int
    dtype: torch.dtype
    read: Any
    ends: tuple[str, str] = ("", "")

    def factors(self) -> Factors:
        return self.read()


class _Folder(Checked):
    def __init__(self, adapter: FinishedAdapter) -> None:
        self.adapter = adapter
        parts = {}
        for name, layer in adapter.layers.items():
            if layer.plain:
                parts[name] = _Part(
                    layer.d_in, layer.d_out, layer.rank, layer.dtype, lambda name=name: adapter.stored(name), layer.ends
                )
                continue
            a, b = adapter.shape(name, "A"), adapter.shape(name, "B")
            parts[name] = _Part(
                math.prod(a[1:]) * (a[0] // b[1] if b[1] else 1), math.prod((b[0], *b[2:])), b[1], layer.dtype,
                lambda name=name: self._convolution(name), layer.ends,
            )
        super().__init__(adapter.folder, adapter.label, parts)

    def _convolution(self, name: str) -> Factors:
        a, b = self.adapter.raw(name, "A"), self.adapter.raw(name, "B")
        groups = groups_of(a, b)
        if not groups:
            raise AdapterFileError(f"{self.label}: the factors of {name} do not fit each other")
        rows = a.unflatten(0, (groups, b.shape[1])).transpose(0, 1).flatten(1)
        return Factors(b.flatten(1) if b.shape[2:].numel() == 1 else b.transpose(1, -1).flatten(0, -2), rows,
                       scaling=self.adapter.layers[name].scaling)


class _File(Checked):
    def __init__(self, path: Path) -> None:
        tensors, self.metadata = read_tensors(path)
        if not tensors:
            raise AdapterFileError(f"{path} holds no tensors")
        parts = {}
        for component, held in key_names.group(tensors, str(path)).items():
            key_names.take_scales(held, component, self.metadata, str(path))
            for name, entry in held.entries.items():
                down, up = entry.pair
                scale = 1.0 if entry.alpha is None or not len(down) else entry.alpha / len(down)
                parts[f"{component}.{name}".lstrip(".")] = _Part(
                    down[0].numel() if len(down) else 0, len(up), len(down), torch.promote_types(down.dtype, up.dtype),
                    lambda down=down, up=up, scale=scale: Factors(up.flatten(1), down.flatten(1), scaling=scale),
                )
        super().__init__(path, str(path), parts)


def _open(adapter: str | os.PathLike | FinishedAdapter) -> _Folder | _File:
    if isinstance(adapter, FinishedAdapter):
        return _Folder(adapter)
    path = Path(adapter)
    return _File(path) if path.is_file() and path.suffix == ".safetensors" else _Folder(FinishedAdapter(path))


def _checked(source: _Folder | _File) -> Check:
    spectra = spectra_of(source)
    energies = {name: spectrum.sigma.square().numpy() for name, spectrum in spectra.items()}
    total = float(sum(energy.sum() for energy in energies.values()))
    rows = []
    for (name, part), (block, role) in zip(source.layers.items(), places(list(source.layers)), strict=True):
        spectrum = spectra[name]
        rows.append(CheckedLayer(
            name, role, block, part.d_in, part.d_out, part.rank, spectrum.significant(),
            effective_rank_of(spectrum.sigma), spectrum.norm,
            float(energies[name].sum()) / total if total else 0.0,
        ))
    costs = np.concatenate([np.full(row.used, row.d_in + row.d_out) for row in rows])
    values = np.concatenate([energies[row.name][: row.used] for row in rows])
    # as the allocator takes them: by value per cost, ties by position
    order = np.lexsort((np.arange(len(values)), -values / np.maximum(costs, 1)))
    spent, kept = np.cumsum(costs[order]), np.sqrt(np.minimum(np.cumsum(values[order]) / (total or 1), 1))
    picked = sorted({int(i) for i in np.linspace(0, len(spent) - 1, _POINTS)}) if len(spent) else []
    curve = [(0, 0.0), *((int(spent[i]), float(kept[i])) for i in picked)]
    keeping = {share: int(spent[np.searchsorted(kept, share)]) for share in KEEPING if len(kept) and kept[-1] >= share}
    params = sum(row.used * (row.d_in + row.d_out) for row in rows)
    stored = sum(row.rank * (row.d_in + row.d_out) for row in rows)
    heads, kind, base, size, readers, alerts = _about(source, rows)
    dtypes = sorted({str(part.dtype).removeprefix("torch.") for part in source.layers.values()})
    found = Check(
        source.path, kind, base, ", ".join(dtypes), rows, stored, params, heads, size, curve, keeping, readers, alerts
    )
    found.alerts += _of_weights(found)
    return found


def _about(
    source: _Folder | _File, rows: Sequence[CheckedLayer]
) -> tuple[dict[str, int], str, str | None, int, list[Verdict], list[str]]:
    """Heads, kind, base, bytes, readers and alerts, from what stands beside the weights."""
    ranks = sorted({row.rank for row in rows})
    spread = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    if isinstance(source, _File):
        return {}, f"LoRA in one file, {spread}", None, source.path.stat().st_size, [], []
    adapter, config = source.adapter, source.adapter.config
    scales = sorted({round(layer.scaling, 6) for layer in adapter.layers.values()})
    scale = f"scale {scales[0]:g}" if len(scales) == 1 else f"scales {scales[0]:g} to {scales[-1]:g}"
    kind = f"{'LoRA' if config['peft_type'] == 'LORA' else 'AdaLoRA'} of PEFT's form, {spread}, {scale}"
    base = config.get("base_model_name_or_path")
    alerts = []
    if base and (os.path.isabs(str(base)) or "\\" in str(base)):
        alerts.append(f"the base model is named by a path of one machine, {base}: others cannot tell what it is for")
    if not base:
        alerts.append("the base model is not named, so nobody can tell what it is for")
    if NESTED_KEY in adapter.metadata:
        alerts.append("it is nested: its first ranks are adapters too (rankalloc shrink --cut nested)")
    heads = {name: math.prod(adapter.head_sources()[name][0].shape) for name in adapter.heads}
    weights = adapter.folder / "adapter_model.safetensors"
    return heads, kind, str(base) if base else None, weights.stat().st_size, verdicts(adapter), alerts


def _of_weights(found: Check) -> list[str]:
    """Sentences on dead layers and directions."""
    alerts = []
    if not any(layer.norm for layer in found.layers):
        return ["every update is zero: this adapter was never trained, or its B is missing"]
    still = [layer.name for layer in found.layers if layer.rank and not layer.norm]
    if still:
        more = f" and {len(still) - 1} more" if len(still) > 1 else ""
        alerts.append(f"{still[0]}{more} of {len(found.layers)} layers do nothing: their updates are zero")
    idle, ranks = sum(la.rank - la.used for la in found.layers if la.norm), sum(la.rank for la in found.layers)
    if idle:
        alerts.append(f"{idle:,} of {ranks:,} directions are zero, or repeat others")
    return alerts


def _interference(sources: Sequence[_Folder | _File]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for source in sources for name in source.layers))
    gathered: dict[tuple[int, int], list[Any]] = {}
    for name in names:
        parts = [(i, source.stored(name)) for i, source in enumerate(sources) if name in source.layers]
        parts = [(i, part) for i, part in parts if part.rank]
        if len({part.P.shape[0] for _, part in parts} | {part.Q.shape[1] for _, part in parts}) > 2:
            label = sources[parts[-1][0]].label
            raise AdapterFileError(f"{name} has other sides in {label}: the adapters are not of one base")
        for pair in interference_of(parts):
            gathered.setdefault((pair.first, pair.second), []).append(pair)
    return [
        {
            "first": str(sources[first].path), "second": str(sources[second].path), "layers": len(pairs),
            **{what: float(np.mean([getattr(pair, what) for pair in pairs]))
               for what in ("output_overlap", "input_overlap", "alignment")},
        }
        for (first, second), pairs in sorted(gathered.items())
    ]
