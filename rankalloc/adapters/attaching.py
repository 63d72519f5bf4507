"""Putting adapters into a model and taking them out again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from ..errors import ConfigError, TargetError, unknown
from ..layers import quantized
from ..layers.adaptable import kind_of, shape_of
from ..layers.coverage import little_covered
from ..layers.experts import ExpertMatrix
from ..layers.kinds import LINEAR
from ..layers.missing import left_frozen, missing_modules
from ..layers.statistics import said_of_statistics, with_running_statistics
from ..layers.targets import ALL_LINEAR, HEAD_NAMES, Targets, find_heads, find_targets, named_heads, unadapted
from ..layers.tied import partners
from ..layers.tuners import is_peft_model, is_tuner_layer
from ..layers.wrapping import unwrapped
from ..options import choice, integer, number
from .adapter import Adapter
from .adapter_set import SCALES, Adapters, parents_in
from .bottleneck import BottleneckAdapter
from .ddp import leave_out_empty
from .experts import ExpertAdapter, unwrap_experts, wrap_experts
from .mixed import Gated
from .plan import RankPlan, initialise
from .starts import OWN_START, pairs_of
from .triplets import BOTTLENECK, INITS, Triplets


def attach(
    model: nn.Module,
    rank: int | None = None,
    alpha: float | None = None,
    target_modules: Targets = ALL_LINEAR,
    *,
    ranks: Mapping[str, int] | None = None,
    exclude_modules: Sequence[str] = (),
    modules_to_save: Sequence[str] | None = None,
    dropout: float = 0.0,
    init: str | None = None,
    scale: str = "lora",
) -> Adapters:
    """Freeze ``model`` and put a P·Λ·Q adapter beside each target layer.

    Random values come from torch's global generator: seed it first for a repeatable start. From then on a transformers
    model's ``save_pretrained``, and so a Trainer, writes an adapter and not the base
    (:mod:`rankalloc.storage.model_saving`).

    Args:
        model: any nn.Module; changed in place. What torch.compile, DataParallel or an average of weights is around is
            adapted inside, under its own names.
        rank: triplets of each adapter, or as many as its weight has rows or columns, and the denominator of the
            scaling; None for the rank that a plan in ``ranks`` was made at, and else 12.
        alpha: numerator of the scaling; None for 2 · rank.
        target_modules: "all-linear" (not output heads and tied embeddings), a list of names or
            suffixes, a regular expression for whole names, or a callable (name, module) -> bool.
        ranks: {full module name: rank} where a layer's rank differs from ``rank``; 0 is allowed. The
            scaling stays that of ``rank``. A plan from :func:`rankalloc.plan_ranks` also says what the adapters
            begin with.
        exclude_modules: names or suffixes never to adapt.
        modules_to_save: modules trained whole and saved with the adapter; None for the task heads
            (classifier, score, ...) that the model has, for what its checkpoint lacked, and for normalisation layers
            with running statistics; () for none.
        dropout: input dropout of the adapters while training.
        init: "svd", "lora", "gate", "lora-fa", "vera" or "lora-xs", see :class:`rankalloc.adapters.adapter.Adapter`;
            or "bottleneck" (:mod:`rankalloc.adapters.bottleneck`), which is no LoRA; None for the plan's, and else
            "svd".
        scale: "lora" for alpha / rank, "rslora" for alpha / √rank (arXiv 2312.03732).

    Returns:
        The adapters; only they and the heads are trainable afterwards. Weights that cannot be adapted, experts
        stacked in one tensor, are named in a warning and in ``adapters.notes``.

    Raises:
        TargetError: adapters are attached already; nothing matches; a match cannot be adapted; a rank in ``ranks`` is
            above min(d_in, d_out).
        ConfigError: a number is out of its range, ``init`` or ``scale`` is unknown, or the plan begins with factors
            that ``init`` does not have.
        RankallocError: a weight is not finite, and ``init`` is "lora-xs", which takes its singular vectors.

    Example:
        >>> import torch, rankalloc as ra
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> adapters = ra.attach(model, rank=4, alpha=8)
        >>> adapters.ranks()
        {'0': 4, '2': 4}
    """
    model = unwrapped(model)
    require_free(model)
    plan = ranks if isinstance(ranks, RankPlan) else None
    if rank is None:
        rank = plan.rank if plan is not None else 12
    if init is None:
        init = plan.init if plan is not None else "svd"
    rank = integer("rank", rank, 1)
    alpha = 2.0 * rank if alpha is None else number("alpha", alpha, ends=False)
    dropout = number("dropout", dropout, 0, 1, ends="low")
    choice("init", init, (*INITS, BOTTLENECK))
    choice("scale", scale, SCALES)
    if init in OWN_START and plan is not None and plan.factors:
        raise ConfigError(
            f"the plan of method {plan.method!r} begins with factors of its own, and init={init!r} with "
            f"{OWN_START[init]}; pass ranks=dict(plan) for its ranks alone"
        )
    heads = find_heads(model) if modules_to_save is None else named_heads(model, modules_to_save)
    statistics = with_running_statistics(model, heads)
    if modules_to_save is None:
        heads += statistics
    targets = find_targets(model, target_modules, exclude_modules, heads)
    layer_ranks = _layer_ranks(targets, rank, ranks or {})
    _require_own_weights(model, targets, heads)
    if init == BOTTLENECK:
        _require_linear(targets, layer_ranks)
    notes = unadapted(model, target_modules, exclude_modules) + left_frozen(model, heads)
    if dropout and any(isinstance(base, ExpertMatrix) for base in targets.values()):
        notes.append(
            "dropout is not applied to the updates of experts: they change a weight, and do not see its inputs"
        )
    notes += said_of_full_ranks({n: r for n, r in layer_ranks.items() if r < rank and n not in (ranks or {})}, rank)
    notes += said_of_statistics(statistics, saved=modules_to_save is None)
    if target_modules == ALL_LINEAR and not exclude_modules:
        notes += little_covered(model, targets, heads)
    if modules_to_save is None:
        notes += _new_modules(model)
    for note in notes:
        warnings.warn(note, stacklevel=3)  # past the attach that everyone calls

    layers = {name: (base, layer_ranks[name]) for name, base in targets.items()}
    pairs = pairs_of(layers, init)  # before anything is changed: a weight may have none
    trainable_before = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    modules: dict[str, Triplets] = {}
    parents = parents_in(model)
    for name, base in targets.items():
        exponent = SCALES[scale]
        kind = ExpertAdapter if isinstance(base, ExpertMatrix) else BottleneckAdapter if init == BOTTLENECK else Adapter
        adapter = kind(
            base, layer_ranks[name], alpha / rank**exponent, init=init, dropout=dropout, pair=pairs.get(name),
            exponent=exponent,
        )
        adapter.train(base.training)
        for parent, attribute in parents.get(id(base), ()):
            parent._modules[attribute] = adapter
        modules[name] = adapter
    wrap_experts(model, {name: adapter for name, adapter in modules.items() if isinstance(adapter, ExpertAdapter)})
    head_modules = {name: model.get_submodule(name) for name in heads}
    for head in head_modules.values():
        head.requires_grad_(True)
    adapters = Adapters(
        model, modules, head_modules, rank, alpha, init, trainable_before, scale=scale, notes=notes
    )
    if plan is not None:
        initialise(adapters.modules, plan)
        adapters.plan = plan
    leave_out_empty(model)
    quantized.let_trainer_train(model)
    return adapters


def detach(adapters: Adapters) -> nn.Module:
    """Take the adapters out; the base layers are as they were, the heads keep what they learned.

    Returns the model, with the same parameters trainable as before attach. Raises RankallocError for the layers of a
    PeftModel.
    """
    parents = parents_in(adapters.model)
    for adapter in adapters.own("PEFT takes them out: call model.unload()").values():
        for parent, attribute in [] if isinstance(adapter, ExpertAdapter) else parents.get(id(adapter), ()):
            parent._modules[attribute] = adapter.base_layer
    unwrap_experts(adapters.model)
    for name, parameter in adapters.model.named_parameters():
        parameter.requires_grad_(name in adapters.trainable_before)
    adapters.modules.clear()
    for end in adapters.on_detach:
        end()
    adapters.on_detach.clear()
    quantized.take_back(adapters.model)
    return adapters.model


def require_free(model: nn.Module) -> None:
    """Raise TargetError when ``model`` carries adapters already, ours or PEFT's."""
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise TargetError("this model has adapters attached already; call rankalloc.detach or rankalloc.merge first")
    if any(isinstance(module, Gated) for module in model.modules()):
        raise TargetError("this model holds a mixture of adapters already; call the mixture's detach() first")
    if is_peft_model(model) or any(is_tuner_layer(module) for module in model.modules()):
        raise TargetError(
            f"this {type(model).__name__} carries adapters of PEFT's, and rankalloc would adapt those; to choose their "
            "ranks use rankalloc.adopt(model) or RankCallback(budget=...), else merge or remove them first "
            "(merge_and_unload, unload, delete_adapter)"
        )


def _require_own_weights(model: nn.Module, targets: Mapping[str, nn.Module], heads: Sequence[str]) -> None:
    """Raise TargetError when a layer to adapt shares its weight with a module that is trained whole."""
    for head in heads:
        for name in partners(model, head):
            if name in targets:
                raise TargetError(
                    f"{name} shares its weight with {head}, which is trained whole, so it cannot be adapted too; leave "
                    "one of them out of target_modules or modules_to_save"
                )


def _require_linear(targets: Mapping[str, nn.Module], ranks: Mapping[str, int]) -> None:
    """Raise TargetError when a bottleneck is to stand behind a layer whose output is not a row of features."""
    for name, base in targets.items():
        if ranks[name] and (isinstance(base, ExpertMatrix) or kind_of(base) not in LINEAR):
            raise TargetError(
                f"a bottleneck stands behind a linear layer, and {name} is a {type(base).__name__}; leave it out of "
                "target_modules"
            )


def _new_modules(model: nn.Module) -> list[str]:
    """One sentence when modules other than task heads are trained whole, since the checkpoint lacked them."""
    known = find_heads(model)
    new = [name for name in missing_modules(model) if name.rsplit(".", 1)[-1] not in HEAD_NAMES and name in known]
    if not new:
        return []
    were, they_are = ("was", "it is") if len(new) == 1 else ("were", "they are")
    return [
        f"{', '.join(new)} {were} not in the model's checkpoint, so {they_are} trained whole and saved with the "
        "adapter; modules_to_save=() leaves everything frozen"
    ]


def _layer_ranks(targets: Mapping[str, nn.Module], rank: int, ranks: Mapping[str, int]) -> dict[str, int]:
    strangers = [name for name in ranks if name not in targets]
    if strangers:
        raise TargetError(unknown("layer in ranks=", strangers[0], targets))
    layer_ranks = {}
    for name, base in targets.items():
        highest = min(shape_of(base))
        value = integer(f"the rank of {name}", ranks[name], 0) if name in ranks else min(rank, highest)
        if value > highest:
            raise TargetError(
                f"rank {value} is above min(d_in, d_out) = {highest} of {name}; lower the rank or exclude that layer"
            )
        layer_ranks[name] = value
    return layer_ranks


def said_of_full_ranks(full: Mapping[str, int], rank: int) -> list[str]:
    """That layers begin at their full rank since ``rank`` is above a side of theirs, in one sentence; nothing when
    there are none.

    Args:
        full: {layer name: its full rank}.
    """
    if not full:
        return []
    name = next(iter(full))
    others = f", and {len(full) - 1} more at theirs" if len(full) > 1 else ""
    return [f"{name} begins at its full rank {full[name]}{others}: {rank} is above the shorter side of its weight"]
