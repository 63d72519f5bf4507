"""Mixing finished adapters in one model: y = W₀x + Σ_k g_k(x) ΔW_k x, with all ranks together under one budget.

The adapters are cut together: one choice over the triplets of all layers of all adapters (:mod:`.truncation`), so the
budget is met exactly and an adapter that needs more gets more. What is lost is counted relative to each adapter's own
‖ΔW_k‖², because a gate can give any adapter all of an input: an adapter that was trained at a larger scale must not
crowd out the others.

The adapters stay as they are. What learns are the gates (:mod:`rankalloc.adapters.gates`), some K · d numbers a layer,
on a few batches of the mixed task. Literature: MoLE (Wu et al., arXiv 2404.13628) and LoRA-Flow (Wang et al., arXiv
2402.11455) train a gate a layer over frozen adapters, X-LoRA (Buehler and Buehler, arXiv 2402.07148) one over the last
hidden state of a second forward pass; Arrow (Ostapenko et al., arXiv 2405.11157) and PHATGOOSE (Muqeeth et al., arXiv
2402.05859) train adapters and gates apart. LoraHub (Huang et al., arXiv 2307.13269) searches constant weights: those
are :func:`rankalloc.compose`, or a mixture whose gates are fixed.

Cost: that of one adapter of the summed rank, and of the gates; one forward pass. Weakness: the gates of a softmax share
one unit, so an input between two domains gets parts of updates that were trained whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..adapters.attaching import require_free
from ..budget import RankBudget
from ..errors import AdapterFileError, ConfigError
from ..layers.adaptable import shape_of
from ..layers.wrapping import unwrapped
from ..lowrank import Factors, Spectrum, cut
from ..options import choice
from ..storage import fingerprint
from ..storage.fitting import at_full_rank, fit
from ..storage.folder import WEIGHTS_NAME, stored_size
from ..storage.layout import Layout
from ..storage.loading import layer_for
from ..storage.mixture_folder import MIXTURE_WEIGHTS, MixtureParts, read_mixture
from ..storage.reading import FinishedAdapter
from .compatible import require_composable
from .mixed_heads import MIXED_HEADS, heads_of
from .mixture import Mixture, require_parts
from .mixture_model import put_in
from .results import CutResult
from .shrinking import open_adapter
from .side_by_side import side_by_side
from .truncation import Progress, SourceLayer, choose_from, cuts, spectra_of, to_write
from .weighted import Shape

Given = str | os.PathLike | FinishedAdapter


def mix(
    model: nn.Module,
    adapters: Sequence[Given] | Mapping[str, Given],
    budget: RankBudget | None = None,
    *,
    gate: str = "layer",
    activation: str = "softmax",
    train: Sequence[str] = ("router",),
    heads: str = "equal",
    balance: bool = True,
    check_base: bool = True,
    same_base: bool = False,
    progress: Progress | None = None,
) -> Mixture:
    """Put several finished adapters into ``model``, weighed for each input by gates that are still to be trained.

    Args:
        model: their base, without adapters; changed in place. Train it with any loop or Trainer: only the gates have
            gradients.
        adapters: folders of plain LoRA, or {name: folder}. A layer that one of them leaves alone is no change there.
        budget: what all updates together may cost; ``fraction`` is relative to what they cost now. None keeps every
            rank, and each adapter then computes exactly what it does alone.
        gate: "layer" for a gate of its own in every layer, over each token's input; "model" for one that all layers
            share, over the mean of the token embeddings.
        activation: "softmax", whose gates add up to 1, or "sigmoid", which lets every adapter in or out by itself.
        train: what trains: some of "router", "scales" (the λ of every triplet) and "heads".
        heads: task heads: "equal" (all adapters must have the same), "first", "average", "none", or "mixed": each
            adapter's own, weighed by gates too.
        balance: count what a cut loses relative to each adapter's own size; False counts ‖·‖_F² of all as one.
        check_base: refuse a model that is not the base an adapter's fingerprint is of.
        same_base: the adapters have the same base, although they name it differently.
        progress: called with (layers done, layers in all, newest values) while layers are decomposed.

    Returns:
        The mixture; its gates weigh all adapters alike at first. ``mixture.save``, ``mixture.export``.

    Raises:
        AdapterFileError: bases differ, a folder is damaged, an adapter does not fit the model, heads differ.
        BudgetError: the budget is above what the adapters have, below its floor, or buys nothing.
        ConfigError: an argument does not fit.
        TargetError: the model has adapters attached already, or does not show what gate="model" looks at.

    Example:
        >>> import copy, tempfile, torch, rankalloc as ra
        >>> base, folders = torch.nn.Sequential(torch.nn.Linear(8, 8)), []
        >>> for _ in range(2):
        ...     adapters = ra.attach(copy.deepcopy(base), rank=2)
        ...     folders.append(ra.save(adapters, tempfile.mkdtemp()))
        >>> mixture = ra.mix(base, {"one": folders[0], "other": folders[1]}, ra.RankBudget(ranks=3))
        >>> sum(ranks["0"] for ranks in mixture.ranks().values()), [p.shape[0] for p in mixture.parameters()]
        (3, [2, 2])
    """
    model = unwrapped(model)
    require_free(model)
    require_parts(train)
    choice("heads", heads, MIXED_HEADS)
    given = adapters if isinstance(adapters, Mapping) else _named(adapters)
    finished = {name: open_adapter(adapter) for name, adapter in given.items()}
    if not finished:
        raise ConfigError("mix needs at least one adapter, got none")
    require_composable([*finished.values()], "zero", same_base)
    if check_base:
        for one in finished.values():
            fingerprint.check(model, one.folder / WEIGHTS_NAME)
    modules = dict(model.named_modules())
    updates = {
        name: {layer: at_full_rank(fit(one, layer, layer_for(layer, modules, one.folder))) for layer in one.layers}
        for name, one in finished.items()
    }
    parts = MixtureParts([*finished], gate, activation, {})
    parts.heads, parts.mixed_heads = heads_of(finished, modules, heads)
    record = None
    if budget is not None:
        updates, record = cut_together(updates, budget, balance, progress)
    for layer in dict.fromkeys(name for one in finished.values() for name in one.layers):
        parts.layers[layer] = _side_by_side([one.get(layer) for one in updates.values()])
    mixture = put_in(model, parts, "the mixture")
    mixture.cut = record
    return mixture.train_only(*train)


def load_mixture(
    model: nn.Module, path: str | os.PathLike, *, train: Sequence[str] = ("router",), check_base: bool = True
) -> Mixture:
    """Put the mixture in folder ``path``, which :meth:`Mixture.save` wrote, into ``model``.

    Args:
        train: what trains, as for :func:`rankalloc.mix`.
        check_base: refuse a model that is not the base whose fingerprint the file carries.

    Raises:
        AdapterFileError: the folder holds no mixture, is damaged, or is one of another model.
        TargetError: the model has adapters attached already.
    """
    model = unwrapped(model)
    require_free(model)
    require_parts(train)
    folder, parts = Path(path), read_mixture(path)
    if check_base:
        fingerprint.check(model, folder / MIXTURE_WEIGHTS)
    modules = dict(model.named_modules())
    for name, updates in parts.layers.items():
        base = layer_for(name, modules, folder)
        theirs, here = (updates[0].Q.shape[1], updates[0].P.shape[0]), shape_of(base)
        if theirs != here:
            raise AdapterFileError(
                f"{folder} was made for another model: {name} is {theirs[0]} → {theirs[1]} in the mixture and "
                f"{here[0]} → {here[1]} here"
            )
    return put_in(model, parts, str(folder)).train_only(*train)


def cut_together(
    updates: Mapping[str, Mapping[str, Factors]], budget: RankBudget, balance: bool = True,
    progress: Progress | None = None,
) -> tuple[dict[str, dict[str, Factors]], CutResult]:
    """The best triplets of all adapters within one budget.

    Args:
        updates: {adapter: {layer: its update}}.
        balance: count what is lost relative to each adapter's ‖ΔW‖².

    Returns:
        ({adapter: {layer: what is kept of it}}, the record of the cut).
    """
    every = Everything(updates)
    spectra = spectra_of(every, None, progress)
    weighed = _relative(every, spectra) if balance else spectra
    chosen = replace(choose_from(every, weighed, budget), spectra=spectra)

    def one(key: str) -> tuple[torch.Tensor, torch.Tensor]:
        return cut(every.stored(key), spectra[key], chosen.ranks[key], torch.float32)

    kept: dict[str, dict[str, Factors]] = {name: {} for name in updates}
    with side_by_side(one, every.places) as pairs:
        for key, (adapter, layer) in every.places.items():
            lora_a, lora_b = pairs(key)
            kept[adapter][layer] = Factors(lora_b, lora_a)
    stored = stored_size(to_write(every, chosen), Layout())
    return kept, CutResult.of(
        cuts(every, chosen, {}), chosen.plan, stored, None, [*updates], gap=chosen.gap,
        metric="each adapter's own size" if balance else "frobenius",
    )


class Everything:
    """The layers of all adapters as one source, called ``<adapter>: <layer>``."""

    label = "these adapters together"

    def __init__(self, updates: Mapping[str, Mapping[str, Factors]]) -> None:
        self._updates = updates
        self.places = {f"{name}: {layer}": (name, layer) for name, layers in updates.items() for layer in layers}
        self.layers: dict[str, SourceLayer] = {
            key: Shape(updates[name][layer].Q.shape[1], updates[name][layer].P.shape[0])
            for key, (name, layer) in self.places.items()
        }

    def stored(self, name: str) -> Factors:
        """The factors of one layer of one adapter."""
        adapter, layer = self.places[name]
        return self._updates[adapter][layer]


def _relative(every: Everything, spectra: Mapping[str, Spectrum]) -> dict[str, Spectrum]:
    """The spectra with σ in units of their adapter's ‖ΔW‖_F, by which triplets of different adapters compare."""
    energy: dict[str, float] = {}
    for key, (adapter, _) in every.places.items():
        energy[adapter] = energy.get(adapter, 0.0) + float(spectra[key].sigma.square().sum())
    sizes = {adapter: value**0.5 or 1.0 for adapter, value in energy.items()}
    return {key: replace(s, sigma=s.sigma / sizes[every.places[key][0]]) for key, s in spectra.items()}


def _side_by_side(updates: Sequence[Factors | None]) -> list[Factors]:
    """One update an adapter; of rank 0 for one that leaves the layer alone."""
    some = next(update for update in updates if update is not None)
    return [Factors(some.P[:, :0], some.Q[:0]) if update is None else update for update in updates]


def _named(adapters: Sequence[Given]) -> dict[str, Given]:
    """{name: adapter}: by its folder, and by the run's where it is that run's adapter."""
    if isinstance(adapters, (str, os.PathLike, FinishedAdapter)):
        raise ConfigError(f"mix takes several adapters, got one: {adapters}; pass [{str(adapters)!r}, ...]")
    found: dict[str, Given] = {}
    for adapter in adapters:
        folder = adapter.folder if isinstance(adapter, FinishedAdapter) else Path(adapter).absolute()
        name = folder.parent.name if folder.name == "adapter" and folder.parent.name else folder.name
        unique, number = name, 2
        while unique in found:
            unique, number = f"{name}-{number}", number + 1
        found[unique] = adapter
    return found
