"""The best adapter within a budget out of any low-rank updates: one choice over all layers by σ².

Keeping a set K of singular triplets over all layers leaves ‖ΔW − ΔW_K‖²_F = Σ σ² of the triplets outside K, since
triplets of one layer are orthogonal and layers do not overlap. For a budget in ranks, the largest σ² of all layers are
therefore the best choice (Eckart and Young, 1936, for a block-diagonal matrix), also with floors, caps and multiples.

For a budget in parameters or bytes, triplets of different layers differ in cost, and the choice is a knapsack. The rule
takes triplets by σ² per cost. With b the first block that no longer fits and ``left`` the budget unspent at that point,

    kept energy ≥ best − σ²(b) · left / cost(b) > best − σ²(b)

(proof in :mod:`rankalloc.methods.allocators.global_topk`). So ‖error‖² exceeds the least possible by less than one
block's σ². :attr:`Choice.gap` is this bound for the given case, less what the rule bought after b.

Cost: two passes over the file, O((d_in + d_out) r²) per layer, and the memory of one layer per thread. Known weakness:
the Frobenius norm knows nothing of the task; see :mod:`rankalloc.posthoc.calibration`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..budget import BudgetPlan, LayerShape, RankBudget
from ..errors import AdapterFileError, BudgetError, ConfigError
from ..lowrank import Factors, Spectrum, cut, decompose, distance
from ..methods.allocators import ALLOCATORS, Demand
from ..storage.folder import NESTED_KEY, Heads, LayerToWrite, lora_config, write_folder
from ..storage.layout import Layout
from ..storage.peft_names import KEY, is_parameter, kept_as_parameters, pattern_of
from .metric import KroneckerMetric
from .results import LayerCut
from .side_by_side import side_by_side

Progress = Callable[[int, int, dict[str, Any]], None]
"""Called with (layers done, layers in all, newest values), like a run's."""


class SourceLayer(Protocol):
    """One layer of a source: the shape and dtype of its update, and what the keys of its pair end with."""

    @property
    def d_in(self) -> int: ...
    @property
    def d_out(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def ends(self) -> tuple[str, str]: ...


class Source(Protocol):
    """Where updates come from: one finished adapter, or several as one."""

    @property
    def layers(self) -> Mapping[str, SourceLayer]:
        """{layer name: its shape}."""
        ...

    @property
    def label(self) -> str:
        """Its name in messages."""
        ...

    def stored(self, name: str) -> Factors:
        """The factors of one layer."""
        ...


@dataclass
class Choice:
    """The ranks that a budget buys.

    Attributes:
        spectra: {layer: its singular form}.
        ranks: {layer: rank to keep}.
        ranks_before: {layer: rank in the source, without zero padding}.
        plan: the resolved budget.
        gap: the most by which any other choice within the budget could lower ‖error‖² (in the metric), as a share of
            ‖ΔW‖²; 0 for a budget in ranks.
    """

    spectra: dict[str, Spectrum]
    ranks: dict[str, int]
    ranks_before: dict[str, int]
    plan: BudgetPlan
    gap: float


def choose(
    source: Source, budget: RankBudget, metric: KroneckerMetric | None = None, progress: Progress | None = None
) -> Choice:
    """Choose the best ranks of all layers within ``budget``.

    A layer's rank counts up to min(d_in, d_out), in whole multiples of the budget's ``multiple_of``.

    Raises:
        BudgetError: the budget is above what the source has, below its floor, or buys nothing.
        AdapterFileError: a weight is not finite.
    """
    spectra = spectra_of(source, metric, progress)
    return choose_from(source, spectra, budget)


def spectra_of(
    source: Source, metric: KroneckerMetric | None = None, progress: Progress | None = None
) -> dict[str, Spectrum]:
    """The singular form of every layer, computed side by side on torch's threads."""

    def one(name: str) -> Spectrum:
        factors = source.stored(name)
        try:
            return decompose(factors, None if metric is None else metric.grams(name, factors))
        except FloatingPointError:
            raise AdapterFileError(f"{source.label}: the weights of {name} are not finite (NaN or inf)") from None

    found = {}
    with side_by_side(one, source.layers) as results:
        for name in source.layers:
            found[name] = results(name)
            if progress is not None:
                progress(len(found), len(source.layers), {"layer": name})
    return found


def choose_from(source: Source, spectra: dict[str, Spectrum], budget: RankBudget) -> Choice:
    """As :func:`choose`, for spectra that are computed already."""
    before = {name: spectrum.rank for name, spectrum in spectra.items()}
    shapes, plan = plan_over(source, before, budget)
    plan.require_spendable()
    scores = [spectra[shape.name].sigma.square().numpy()[: shape.rank] for shape in shapes]
    demand = Demand.of(plan, plan.target)
    kept = [int(mask.sum()) for mask in ALLOCATORS["global"](scores, demand)]
    ranks = {shape.name: rank for shape, rank in zip(shapes, kept, strict=True)}
    total = sum(float(values.sum()) for values in scores)
    gap = most_energy(scores, demand) - sum(float(v[:k].sum()) for v, k in zip(scores, kept, strict=True))
    return Choice(spectra, ranks, before, plan, max(0.0, gap) / total if total > 0 and plan.unit != "ranks" else 0.0)


def plan_over(source: Source, ranks: Mapping[str, int], budget: RankBudget) -> tuple[list[LayerShape], BudgetPlan]:
    """Resolve ``budget`` for layers of these ranks.

    Raises:
        BudgetError: the budget cannot be met.
        ConfigError: it is not a RankBudget.
    """
    if not isinstance(budget, RankBudget):
        raise ConfigError(f"budget must be a RankBudget, such as RankBudget(fraction=0.25), got {budget!r}")
    step = budget.multiple_of
    shapes = [
        LayerShape(name, layer.d_in, layer.d_out, ranks[name] // step * step) for name, layer in source.layers.items()
    ]
    sizes = {layer.dtype.itemsize for layer in source.layers.values()}
    if budget.bytes is not None and len(sizes) > 1:
        raise BudgetError("the adapter's layers have weights of different sizes in bytes; give the budget as params=")
    whole = f" in multiples of {step}" if step > 1 else ""
    return shapes, budget.resolve(
        shapes, bytes_per_param=max(sizes), most=f"that {source.label} holds{whole}", way_out="lower it",
        finished=True,
    )


def most_energy(scores: list[np.ndarray], demand: Demand) -> float:
    """An upper bound of the energy that any choice can keep: blocks in falling σ² per cost, the last one in part."""
    size, left, energy, queue = demand.multiple_of, float(demand.amount), 0.0, []
    for values, cost, floor, cap in zip(scores, demand.costs, demand.floors, demand.caps, strict=True):
        left -= cost * floor
        energy += float(values[:floor].sum())
        blocks = values[floor : cap // size * size].reshape(-1, size).sum(1)
        queue += [(float(block) / (cost * size), cost * size) for block in blocks]
    for density, cost in sorted(queue, reverse=True):
        part = min(cost, left)
        energy += density * part
        left -= part
        if left <= 0:
            break
    return energy


def write_choice(
    source: Source,
    choice: Choice,
    out: str | os.PathLike,
    heads: Heads,
    config: Mapping[str, Any],
    layout: Layout,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Write the chosen triplets; ``config`` and ``metadata`` are those of the source.

    Returns {layer: ‖ΔW − (update in the file)‖_F} for layers below float32, where the rounding of the file counts.
    """
    layout.check()
    measured: dict[str, float] = {}

    def factors(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        whole, dtype = source.stored(name), source.layers[name].dtype
        lora_a, lora_b = cut(whole, choice.spectra[name], choice.ranks[name], dtype)
        if dtype.itemsize < 4:
            measured[name] = distance(whole, lora_a, lora_b)
        return lora_a, lora_b

    layers = to_write(source, choice)
    # in the order in which the file takes them
    with side_by_side(factors, sorted(name for name in layers if layers[name].rank)) as results:
        write_folder(
            out, layers, results, heads, lambda names, rank: config_of(config, names, rank, layers), layout,
            passed_on(metadata or {}),
        )
    return measured


def to_write(source: Source, choice: Choice) -> dict[str, LayerToWrite]:
    """The layers of the source at their chosen ranks."""
    return {
        name: LayerToWrite(layer.d_in, layer.d_out, choice.ranks[name], layer.dtype, layer.ends)
        for name, layer in source.layers.items()
    }


def passed_on(metadata: Mapping[str, str], nested: bool = False) -> dict[str, str]:
    """The metadata that a file made from another keeps; ``nested`` if its triplets are the first of each layer."""
    own = ("format", "rankalloc_config") if nested else ("format", "rankalloc_config", NESTED_KEY)
    return {key: value for key, value in metadata.items() if key not in own}


def cuts(source: Source, choice: Choice, measured: Mapping[str, float]) -> list[LayerCut]:
    """Each layer before and after ``choice``; ``measured`` has the errors that :func:`write_choice` measured."""
    found = []
    for name, layer in source.layers.items():
        spectrum, rank = choice.spectra[name], choice.ranks[name]
        energy = spectrum.sigma.square()
        found.append(LayerCut(
            name=name, d_in=layer.d_in, d_out=layer.d_out, rank_before=choice.ranks_before[name], rank=rank,
            norm=spectrum.norm, error=measured.get(name, spectrum.error(rank)),
            metric_norm=math.sqrt(float(energy.sum())), metric_error=math.sqrt(float(energy[rank:].sum())),
        ))
    return found


def config_of(
    source: Mapping[str, Any], written: list[str], rank: int, layers: Mapping[str, Any]
) -> dict[str, Any]:
    """The adapter_config.json of a plain LoRA made from an adapter of the configuration ``source``."""
    same = {
        key: source[key]
        for key in ("base_model_name_or_path", "task_type", "revision", "auto_mapping", "modules_to_save",
                    "fan_in_fan_out")
        if key in source
    }
    parameters = kept_as_parameters(source, written)
    if parameters:
        same[KEY] = parameters
    kept = ("layers_to_transform", "layers_pattern", "exclude_modules")
    if len(written) == len(layers) and source.get("target_modules") is not None:
        return lora_config(rank, source["target_modules"], **same, **{k: source[k] for k in kept if k in source})
    modules = [name for name in written if not is_parameter(name, parameters)]
    return lora_config(rank, pattern_of(modules, parameters), **same)
