"""Refining a finished adapter without training: its singular values are weighed anew, its directions stay.

Spectral Surgery (Tian et al., 2026, arXiv 2603.03995). With ΔW = Σ σᵢ uᵢvᵢᵀ and G = ∂L/∂ΔW on a calibration set,

    ∂L/∂σᵢ = uᵢᵀ G vᵢ                                                                                  (1)

says how much the loss would change with each singular value. A rule turns it into factors mᵢ in [1/bound, bound]:

    select      the fifth of a layer's values with the largest mean |∂L/∂σ| grows by ``bound``, the fifth with the
                smallest shrinks by it, the rest stays (the paper's)
    gradient    σᵢ · bound^(−zᵢ), zᵢ = σᵢ ∂L/∂σᵢ over the layer's largest |σ ∂L/∂σ|: one step of exponentiated gradient
                (Kivinen and Warmuth, 1997) against the signed mean gradient

and σᵢ ← σᵢ · clip(c mᵢ, 1/bound, bound), with c such that the layer keeps its Σσ. ΔW is never formed: with P and Q the
factors, (1) follows from ∂L/∂P.

The control is the same factors handed to other values of the layer by chance (``shuffled``): what it reaches needs no
gradients. Known weakness: gradients of a loss that training has made small are noise; the study refine has figures.

Cost: a forward and a backward pass for each batch, r² numbers a layer.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq
from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.adapter_set import Adapters
from ..budget import RankBudget
from ..errors import ConfigError, RankallocError, unknown
from ..files import write_json
from ..layers.batches import evaluating, on_device
from ..lowrank import Factors, Spectrum, decompose
from ..options import integer, number
from ..storage.folder import Stored, stored_size
from ..storage.readers import layout_for
from ..storage.reading import FinishedAdapter
from .calibration import Batch, attached, model_loss
from .shrinking import open_adapter
from .truncation import SourceLayer, choose_from, spectra_of, to_write, write_choice

RECORD_NAME = "refine.json"
_SHARE = 0.2  # of a layer's values, that grow and that shrink under "select"
_DRIVEN = "save them, and give sensitivities the plain model and the folder"


@dataclass(frozen=True)
class Sensitivity:
    """How the loss of one layer changes with its singular values: σ·∂L/∂σ, (r,) float64, by falling σ.

    Attributes:
        mean: over batches, with its sign.
        size: the mean of its absolute value.
    """

    mean: torch.Tensor
    size: torch.Tensor


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


def sensitivities(
    model: nn.Module,
    adapter: Adapters | str | os.PathLike,
    batches: Iterable[Batch],
    *,
    loss: Callable[[nn.Module, Batch], torch.Tensor] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Sensitivity]:
    """Measure how the loss changes with each singular value of a finished adapter; the model is afterwards as it was.

    Args:
        model: without adapters if ``adapter`` is a folder, else the model that has them.
        adapter: the folder that will be refined, or the same adapter loaded by :func:`rankalloc.load`.
        batches: mappings of tensors that the model is called with.
        loss: turns (model, batch) into a scalar; None takes the ``loss`` of the model's output.
        progress: called with the number of batches done.

    Raises:
        ConfigError: there are no batches.
        RankallocError: the model returns no loss, or a gradient is not finite.
    """
    device = next(model.parameters()).device
    sums: dict[str, Sensitivity] = {}
    count = 0
    with attached(model, adapter) as adapters, evaluating(model):
        layers = {name: each for name, each in adapters.own(_DRIVEN).items() if each.rank}
        turns = {name: _Turn.of(each) for name, each in layers.items()}
        for batch in batches:
            value = (loss or model_loss)(model, on_device(batch, device))
            # autograd.grad leaves the parameters' own gradients as they are
            found = torch.autograd.grad(value, [each.P for each in layers.values()], allow_unused=True)
            for (name, each), gradient in zip(layers.items(), found, strict=True):
                seen = turns[name](each, torch.zeros_like(each.P) if gradient is None else gradient)
                if not torch.isfinite(seen).all():
                    raise RankallocError(f"the gradients of {name} are not finite on batch {count + 1}")
                before = sums.get(name, Sensitivity(torch.zeros_like(seen), torch.zeros_like(seen)))
                sums[name] = Sensitivity(before.mean + seen, before.size + seen.abs())
            count += 1
            if progress is not None:
                progress(count)
    if not count:
        raise ConfigError("sensitivities need at least one batch")
    return {name: Sensitivity(one.mean / count, one.size / count) for name, one in sums.items()}


@dataclass(frozen=True)
class _Turn:
    """Maps ∂L/∂P (d_out, r) of an adapter to σ·∂L/∂σ.

    ∂L/∂P = G Qᵀ diag(d), d = s·λ. With P·left = U Σ^½ and right·Q = Σ^½Vᵀ (:class:`rankalloc.lowrank.Spectrum`),
    σᵢ uᵢᵀ G vᵢ = leftᵢᵀ (Pᵀ ∂L/∂P) diag(1/d) rightᵢᵀ; where d is 0, so is that column of ``right``.
    """

    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def of(cls, adapter: Adapter) -> _Turn:
        factors = Factors(adapter.P.detach(), adapter.Q.detach(), adapter.lam.detach(), adapter.scaling)
        spectrum, diagonal = decompose(factors), factors.diagonal()
        return cls(spectrum.left, spectrum.right * torch.where(diagonal == 0, 0.0, 1 / diagonal))

    def __call__(self, adapter: Adapter, gradient: torch.Tensor) -> torch.Tensor:
        core = (adapter.P.detach().T.double() @ gradient.double()).cpu()
        return ((self.left.T @ core) * self.right).sum(1)


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
        bound: no value grows by more than this factor, or shrinks by more; above 1.
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
        factors[name] = _factors(sigma, seen, rule, bound, None if shuffled is None else _draw(shuffled, name))
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
    """The bound as a float. Raises ConfigError when there is no such rule, or the bound is not above 1."""
    if rule not in RULES:
        raise ConfigError(unknown("rule", rule, RULES))
    return number("bound", bound, 1, ends="high")


def _of(sensitivity: Mapping[str, Sensitivity], name: str, sigma: torch.Tensor) -> Sensitivity:
    """That of one layer, with as many entries as it has singular values."""
    if not len(sigma):
        return Sensitivity(sigma, sigma)
    seen = sensitivity.get(name)
    if seen is None or len(seen.mean) < len(sigma):
        raise ConfigError(f"these sensitivities are of another adapter: they do not fit {name}")
    return Sensitivity(seen.mean[: len(sigma)], seen.size[: len(sigma)])


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


def _factors(
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
