"""The adapters of one model, as a set: what attach returns and everything else works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ..budget import LayerShape
from ..errors import RankallocError
from ..layer_names import places
from ..trace import LayerRecord
from .adapter import Adapter
from .parameter_groups import parameter_groups
from .plan import RankPlan
from .triplets import Triplets

SCALES = {"lora": 1.0, "rslora": 0.5}
"""{scale: e} of s = alpha / rank^e, with the rank at the start: LoRA's, and rsLoRA's, whose updates do not vanish as
the rank grows (Kalajdzievski, arXiv 2312.03732). The exported files hold s, so no reader needs to know which it was."""


class Adaptation(Protocol):
    """The controller or callback that is to choose ranks for a set of adapters."""

    def check_adapted(self) -> None:
        """Raise NotAdaptedError when it never did."""


@dataclass(eq=False)
class Adapters:
    """All adapters of a model, in the model's order. Made by :func:`rankalloc.attach` or
    :func:`rankalloc.load`.

    Attributes:
        model: the adapted model.
        modules: {module name: its triplets}, an :class:`~rankalloc.adapters.adapter.Adapter` each, or a view of a layer
            of PEFT's (:func:`rankalloc.adopt`).
        heads: {module name: module} of the task heads that train along.
        rank, alpha: as given to attach, or in PEFT's configuration.
        init: parametrisation, a key of ``rankalloc.adapters.triplets.TRAINED``.
        trainable_before: names of the parameters that were trainable before attach.
        adaptation: the controller or callback that chooses these adapters' ranks, once there is one.
        plan: the plan they began with, if ranks were chosen before training.
        merge_loss: {module name: share of its update that rounding lost}, once they were merged.
        scale: "lora" or "rslora", a key of :data:`SCALES`.
        nested: whether they are trained so that the first triplets of each are an adapter too
            (:func:`rankalloc.at_rank`).
        notes: one sentence for each thing the user should know; they become alerts of a run's trace.
        on_detach: called when the adapters leave the model, to undo what their training set up.
        beyond: what else trains in the model that :func:`rankalloc.save` cannot write, in a few words; "" for nothing.
        on_resize: called when ranks have left memory, so that what others record of them can follow.
        nested_exponent: e of nested ones, whose first b of r triplets are used at (r / b)^e times their scale; None for
            that of ``scale``.
    """

    model: nn.Module
    modules: dict[str, Triplets]
    heads: dict[str, nn.Module]
    rank: int
    alpha: float
    init: str
    trainable_before: set[str] = field(repr=False, default_factory=set)
    adaptation: Adaptation | None = field(repr=False, default=None)
    plan: RankPlan | None = field(repr=False, default=None)
    merge_loss: dict[str, float] = field(repr=False, default_factory=dict)
    scale: str = "lora"
    nested: bool = False
    notes: list[str] = field(repr=False, default_factory=list)
    on_detach: list[Callable[[], None]] = field(repr=False, default_factory=list)
    on_resize: list[Callable[[], None]] = field(repr=False, default_factory=list)
    beyond: str = field(repr=False, default="")
    nested_exponent: float | None = None

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[Triplets]:
        return iter(self.modules.values())

    def __repr__(self) -> str:
        live, trained = sum(self.ranks().values()), self.trainable_params()
        of_them = f", {trained:,} trained" if trained < self.num_params() else ""
        size = f"{self.num_params():,} parameters{of_them}"
        return f"Adapters({len(self)} layers, {live} live ranks, {size}, init={self.init!r})"

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / √rank: s of every layer, unless an alpha_pattern of PEFT's gives some their own."""
        return self.alpha / self.rank ** SCALES[self.scale]

    @property
    def cut_exponent(self) -> float:
        """e of the scale (r / b)^e that the first b of r triplets are used at, where they are nested."""
        return SCALES[self.scale] if self.nested_exponent is None else self.nested_exponent

    def ranks(self) -> dict[str, int]:
        """{module name: live rank}."""
        return {name: adapter.live_rank for name, adapter in self.modules.items()}

    def num_params(self) -> int:
        """Parameters of the plain LoRA these adapters export to: d_in + d_out for each live rank; of bottlenecks, all
        they have."""
        return sum(adapter.params_per_rank * adapter.live_rank + adapter.extra_params() for adapter in self)

    def head_params(self) -> dict[str, int]:
        """{head name: parameters} of the heads that train along; no budget counts them."""
        return {name: sum(p.numel() for p in head.parameters()) for name, head in self.heads.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters: those of the adapters, then those of the heads."""
        own = [p for adapter in self for p in adapter.trained()]
        return own + [p for head in self.heads.values() for p in head.parameters()]

    def ignored_params(self) -> set[nn.Parameter]:
        """What FSDP2's ``fully_shard(..., ignored_params=)`` has to leave whole: every factor, trained or not, and the
        heads; see :mod:`rankalloc.training.sharding`."""
        return set(self.whole_parameters())

    def whole_parameters(self) -> Iterator[nn.Parameter]:
        """What every process has to hold whole, in the same order in each: all factors, then the heads."""
        for adapter in self:
            yield from adapter.own_parameters()
        for head in self.heads.values():
            yield from head.parameters()

    def trainable_params(self) -> int:
        """Numbers that the optimizer trains in the adapters now, heads apart: fewer than :meth:`num_params` where
        factors are frozen (LoRA-FA, VeRA, LoRA-XS), and more by λ where it is trained."""
        return sum(p.numel() for adapter in self for p in adapter.trained())

    def parameter_groups(
        self, lr: float, plus_ratio: float = 16.0, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Groups for a torch optimizer with LoRA+'s two rates; see :mod:`rankalloc.adapters.parameter_groups`."""
        return parameter_groups(self, self.heads, lr, plus_ratio, weight_decay)

    def shapes(self) -> list[LayerShape]:
        """The layers as a budget sees them; ``rank`` is the number of triplets held now."""
        return [LayerShape(name, a.d_in, a.d_out, a.rank, a.extra_params()) for name, a in self.modules.items()]

    def bytes_per_param(self) -> int:
        """Size of one adapter parameter in bytes."""
        return next(iter(self)).P.element_size()

    def layer_records(self) -> list[LayerRecord]:
        """The layers as the trace keeps them."""
        placed = zip(self.modules.items(), places(list(self.modules)), strict=True)
        return [
            LayerRecord(
                name=name, kind=a.layout.name, block=block, role=role, d_in=a.d_in, d_out=a.d_out,
                initial_rank=a.initial_rank,
            )
            for (name, a), (block, role) in placed
        ]

    def singular_values(self) -> dict[str, torch.Tensor]:
        """{module name: true singular values of ΔW, falling, float64}."""
        return {name: adapter.singular_values() for name, adapter in self.modules.items()}

    def train_in(self, dtype: torch.dtype) -> None:
        """Hold every factor in ``dtype`` from now on, as the same parameters. Call it before the first step."""
        for adapter in self:
            for parameter in adapter.own_parameters():
                parameter.data = parameter.data.to(dtype)

    def resized(self) -> None:
        """Tell whoever records these ranks that some have left memory."""
        for follow in self.on_resize:
            follow()

    def own(self, way_out: str) -> dict[str, Adapter]:
        """{module name: adapter}. Raises RankallocError for layers of PEFT's; ``way_out`` says what to call instead."""
        found = {name: adapter for name, adapter in self.modules.items() if isinstance(adapter, Adapter)}
        if len(found) < len(self):
            raise RankallocError(f"these are a PeftModel's own LoRA layers; {way_out}")
        return found

    def check_adapted(self) -> None:
        """Raise NotAdaptedError when ranks were to be chosen for these adapters and never were."""
        if self.adaptation is not None:
            self.adaptation.check_adapted()


def parents_in(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """{id of a module: every (parent, attribute) under which it hangs}: shared layers have several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent, key))
    return found


def parents_of(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Every (parent, attribute) under which ``module`` hangs in ``model``: shared layers have several."""
    return [(p, key) for p in model.modules() for key, child in p._modules.items() if child is module]
