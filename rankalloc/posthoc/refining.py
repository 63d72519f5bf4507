"""Refining a finished adapter without training: its singular values are weighed anew, its directions stay.

Spectral Surgery (Tian et al., 2026, arXiv 2603.03995). A rule turns ∂L/∂σᵢ on a calibration set (``sensitivity``) into
factors mᵢ in [1/bound, bound]:

    select      the fifth of a layer's values with the largest mean |∂L/∂σ| grows by ``bound``, the fifth with the
                smallest shrinks by it, the rest stays: ``abs_select`` of github.com/TTtianTT/lora-spectral-edit
    gradient    bound^(−zᵢ), zᵢ = σᵢ ∂L/∂σᵢ over the layer's largest |σ ∂L/∂σ|: one step down the signed mean gradient
                in ln σ, whose largest move is ln bound (``gd`` there has other step sizes)

and σᵢ ← σᵢ · clip(c mᵢ, 1/bound, bound), with c such that the layer keeps its Σσ. Three things differ in that code: it
ranks by the absolute value of the gradient summed over the calibration set, not by the mean over batches of its
absolute value; it has no clip, so that c may carry a value past the bound; and it edits o_proj and down_proj alone.

The control is the same factors handed to other values of the layer by chance (``shuffled``): what it reaches needs no
gradients. Known weaknesses: gradients of a loss that training has made small are noise; and Σσ is kept, not ‖ΔW‖_F, so
a layer whose large values grow becomes a larger update, which a shuffle does not. See the study refine.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq

from ..budget import RankBudget
from ..errors import ConfigError, unknown
from ..files import write_json
from ..lowrank import Factors, Spectrum
from ..options import integer, number
from ..storage.folder import Stored, stored_size
from ..storage.readers import layout_for
from ..storage.reading import FinishedAdapter
from .sensitivity import Sensitivity
from .shrinking import open_adapter
from .truncation import SourceLayer, choose_from, spectra_of, to_write, write_choice

RECORD_NAME = "refine.json"
_SHARE = 0.2  # of a layer's values, that grow and that shrink under "select"
_WIDEST = 100.0  # wider bounds are typing mistakes, and Σσ could not be kept to rounding
_SAME = 0.02  # singular values in half precision and in full differ by less, as a share of the layer's largest


@dataclass(frozen=True)
class RefinedLayer:
    """One layer: its singular values before, falling, the factor of each, and the mean σ·∂L/∂σ they come from."""

    name: str
    sigma: list[float]
    factors: list[float]
    sensitivity: list[float]


@dataclass(frozen=True)
class Refinement:
    """The result of :func:`refine`.

    Attributes:
        layers: each layer before, and its factors.
        rule, bound, shuffled: as they were asked for.
        stored: what the adapter's tensors in the written folder hold.
        path: the written folder; None when nothing was written.
        source: name of the folder that was read.
    """

    layers: list[RefinedLayer]
    rule: str
    bound: float
    shuffled: int | None
    stored: Stored
    path: Path | None
    source: str

    def record(self) -> dict[str, Any]:
        """The record as plain values for JSON."""
        return {
            "version": 1, "source": self.source, "rule": self.rule, "bound": self.bound, "shuffled": self.shuffled,
            "stored": asdict(self.stored), "layers": [asdict(layer) for layer in self.layers],
        }


def refine(
    adapter: str | os.PathLike | FinishedAdapter,
    sensitivity: Mapping[str, Sensitivity],
    out: str | os.PathLike | None = None,
    *,
    rule: str = "select",
    bound: float = 1.25,
    shuffled: int | None = None,
    layout: str | None = None,
    pad_multiple: int = 1,
    reader: str | None = None,
) -> Refinement:
    """Weigh the singular values of a finished adapter anew; its ranks, its directions and each layer's Σσ stay.

    Args:
        adapter: a folder, as for :func:`rankalloc.shrink`; heads go along as they are.
        sensitivity: of this adapter, from :func:`sensitivities`.
        out: folder to write, with ``refine.json``; None only computes.
        rule: "select" or "gradient", see :mod:`rankalloc.posthoc.refining`.
        bound: no value grows by more than this factor, or shrinks by more; above 1, at most 100.
        shuffled: a seed hands the factors to other values of the same layer by chance, which is the control.
        layout, pad_multiple, reader: as for :func:`rankalloc.save`.

    Raises:
        ConfigError: an argument is out of its range, ``sensitivity`` is of another adapter, or the adapter's update is
            zero.
        AdapterFileError: the folder is damaged or of a type that is not supported.
        RankallocError: ``out`` cannot be written; nothing is changed then.
    """
    written = layout_for(layout, pad_multiple, reader)
    bound = check_arguments(rule, bound)
    if shuffled is not None:
        shuffled = integer("shuffled", shuffled, 0)
    finished = open_adapter(adapter, out)
    spectra = spectra_of(finished)
    layers, factors = [], {}
    for name, spectrum in spectra.items():
        sigma = spectrum.sigma[: spectrum.rank]
        seen = _of(sensitivity, name, sigma)
        factors[name] = scaled_factors(sigma, seen, rule, bound, None if shuffled is None else _draw(shuffled, name))
        layers.append(RefinedLayer(name, sigma.tolist(), factors[name].tolist(), seen.mean.tolist()))
    source = _Reweighed(finished, spectra, factors)
    changed = spectra_of(source)
    ranks = {name: spectrum.rank for name, spectrum in changed.items()}
    if not any(ranks.values()):
        raise ConfigError(f"{finished.folder} changes nothing, so there is nothing to refine")
    choice = choose_from(source, changed, RankBudget(ranks=sum(ranks.values())))
    result = Refinement(
        layers, rule, bound, shuffled, stored_size(to_write(source, choice), written, finished.metadata),
        None if out is None else Path(out), finished.folder.name,
    )
    if out is not None:
        write_choice(source, choice, out, finished.head_sources(), finished.config, written, finished.metadata)
        write_json(Path(out) / RECORD_NAME, result.record())
    return result


def check_arguments(rule: str, bound: float) -> float:
    """The bound as a float. Raises ConfigError when there is no such rule, or the bound is out of its range."""
    if rule not in RULES:
        raise ConfigError(unknown("rule", rule, RULES))
    return number("bound", bound, 1, _WIDEST, ends="high")


def _of(sensitivity: Mapping[str, Sensitivity], name: str, sigma: torch.Tensor) -> Sensitivity:
    """That of one layer, with as many entries as it has singular values; the file may leave out those that are zero."""
    count = len(sigma)
    if not count:
        return Sensitivity(sigma, sigma, sigma)
    seen = sensitivity.get(name)
    if seen is not None and len(seen.mean) >= count:
        apart = seen.sigma.clone()
        apart[:count] -= sigma
        if apart.abs().max() <= _SAME * sigma[0]:
            return Sensitivity(seen.mean[:count], seen.size[:count], sigma)
    raise ConfigError(f"these sensitivities are of another adapter: their singular values are not those of {name}")


def _draw(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode("utf-8", "surrogatepass")))


def _select(sigma: torch.Tensor, seen: Sensitivity, bound: float) -> torch.Tensor:
    slope = torch.where(sigma > 0, seen.size / sigma, 0.0)
    order, some = slope.argsort(stable=True), min(max(1, round(_SHARE * len(sigma))), len(sigma) // 2)
    factors = torch.ones_like(sigma)
    factors[order[:some]] = 1 / bound
    factors[order[len(order) - some :]] = bound
    return factors


def _gradient(sigma: torch.Tensor, seen: Sensitivity, bound: float) -> torch.Tensor:
    largest = seen.mean.abs().max()
    return bound ** (-seen.mean / largest) if largest > 0 else torch.ones_like(sigma)


RULES: dict[str, Callable[[torch.Tensor, Sensitivity, float], torch.Tensor]] = {
    "select": _select, "gradient": _gradient,
}
"""{name: the factors of one layer's σ (r,), from its sensitivity and the bound}."""


def scaled_factors(
    sigma: torch.Tensor, seen: Sensitivity, rule: str, bound: float, draw: torch.Generator | None
) -> torch.Tensor:
    """The factor of each value, within the bound and with Σσ kept."""
    if len(sigma) < 2 or not sigma[0] > 0:
        return torch.ones_like(sigma)
    wanted = RULES[rule](sigma, seen, bound)
    if draw is not None:
        wanted = wanted[torch.randperm(len(wanted), generator=draw)]

    def scaled(common: float) -> torch.Tensor:
        return (common * wanted).clamp(1 / bound, bound)

    total = float(sigma.sum())
    # at the ends every factor is 1/bound, or bound, so the sum is below and above the total; it rises in between
    common = brentq(lambda c: float((sigma * scaled(c)).sum()) - total, bound**-2, bound**2, xtol=1e-14)
    return scaled(common)


class _Reweighed:
    """An adapter with other singular values, as one source of factors."""

    label = "the refined adapter"

    def __init__(
        self, finished: FinishedAdapter, spectra: Mapping[str, Spectrum], factors: Mapping[str, torch.Tensor]
    ) -> None:
        self.finished, self.spectra, self.factors = finished, spectra, factors
        self.layers: Mapping[str, SourceLayer] = finished.layers

    def stored(self, name: str) -> Factors:
        """The factors of one layer in singular form, P = U(mΣ)^½ and Q = (mΣ)^½Vᵀ, in float64."""
        plain, spectrum, share = self.finished.stored(name), self.spectra[name], self.factors[name].sqrt()
        rank = len(share)
        return Factors(
            plain.P.double() @ spectrum.left[:, :rank] * share,
            share[:, None] * (spectrum.right[:rank] @ plain.Q.double()),
        )
