"""Averages of the weights (EMA, SWA) whose ranks follow those of the model that trains.

torch's AveragedModel is a deep copy of the model, and averages it parameter by parameter. When the trained adapters
lose triplets, the copy's have to lose the same ones; and where they are rewritten in another basis
(:mod:`rankalloc.adapters.canonical`), the copy's have to be brought into it, or triplet i of the one would be
averaged with something else's of the other.

An average of factors is no product of averages, and no change of the trained factors' basis leaves the copy's Λ
diagonal. So the copy keeps its own ΔW, exactly, and is written with the balanced factors that are nearest to the
trained ones: with ΔW = U Σ Vᵀ and the trained, canonical P, σ, Q,

    L = U Σ^½ G,   R = V Σ^½ G,   G orthogonal, nearest to  P σ^½  and  Qᵀ σ^½  (Procrustes; Schönemann, 1966),
    P' = L / ‖L_i‖,   Q'ᵀ = R / ‖R_i‖,   Λ'_i = ‖L_i‖ ‖R_i‖.

Where Λ stays 1 and P and Q hold the size (plain LoRA, and layers of PEFT's), σ_i is ‖P_i‖ ‖Q_i‖, P and Q are taken at
length 1, and P' = L, Q'ᵀ = R: their lengths are equal already, as in the canonical form.

A copy that is equal to the trained adapters is so afterwards.

Cost: a copy of the model, as an average always is; a QR and two r × r SVDs a layer where the basis changes. Weakness:
what a dropped triplet still contributed to the average is removed at once instead of decaying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..adapters.adapter import COPIES, Adapter
from ..adapters.adapter_set import Adapters
from ..adapters.driven import COPIED_LAYERS, DrivenLayer, origins_of
from ..adapters.peft_files import write_patterns
from ..adapters.triplets import TRAINED, Triplets
from ..errors import RankallocError
from ..layers.tuners import holds_adapters
from .wrappers import wrappers_of


def copy_of(adapters: Adapters, averaged: nn.Module) -> Adapters:
    """The adapters of ``averaged``, a deep copy of the model that ``adapters`` are in, or a module around one.

    Raises:
        RankallocError: it is no such copy, or its adapters hold other ranks.
    """
    found = {copy.origin: (name, copy) for name, copy in _members(averaged)}
    if any(adapter.origin not in found or found[adapter.origin][1].P is adapter.P for adapter in adapters):
        raise RankallocError(
            f"this {type(averaged).__name__} holds no copy of these adapters; make it from the model after "
            "rankalloc.attach: AveragedModel(model)"
        )
    modules = {name: found[adapter.origin][1] for name, adapter in adapters.modules.items()}
    for (name, adapter), copy in zip(adapters.modules.items(), modules.values(), strict=True):
        if copy.rank != adapter.rank:
            raise RankallocError(
                f"the average holds {copy.rank} triplets of {name} and the model {adapter.rank}: ranks have left "
                "memory since it was made; make it anew, or follow it before training begins"
            )
        copy.drawn = 0
    first = next(iter(adapters.modules))
    model = averaged.get_submodule(found[adapters.modules[first].origin][0].removesuffix(first).rstrip("."))
    heads = {name: model.get_submodule(name) for name in adapters.heads}
    return replace(
        adapters, model=model, modules=modules, heads=heads, notes=list(adapters.notes), merge_loss={}, on_detach=[],
        on_resize=_pattern_writers(averaged, modules.values()),
    )


def _pattern_writers(averaged: nn.Module, copies: Iterable[Triplets]) -> list[Callable[[], None]]:
    """What keeps the average's own configuration of PEFT's true to its ranks, and does so now; empty where it has
    none: around adapters of ours, or a copy of the plain model alone."""
    driven = next((copy for copy in copies if isinstance(copy, DrivenLayer)), None)
    if driven is None:
        return []
    hosts = [module for module in averaged.modules() if holds_adapters(module) and driven.layer in module.modules()]
    if not hosts:
        return []
    writer = partial(write_patterns, hosts[0], driven.adapter_name)
    writer()
    return [writer]


def _members(model: nn.Module) -> Iterator[tuple[str, Triplets]]:
    """Every adapter in ``model`` with its module's name, driven layers of PEFT's included."""
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            yield name, module
        for adapter_name in origins_of(module):
            yield name, DrivenLayer(module, adapter_name)


def require_followed(adapters: Adapters, followed: Sequence[Adapters]) -> None:
    """Raise RankallocError when there is an AveragedModel of these adapters that is not followed."""
    origins, known = {a.origin for a in adapters}, {_place(a) for copies in followed for a in copies}
    strangers: list[nn.Module] = [copy for copy in COPIES if copy.origin in origins and (id(copy), "") not in known]
    strangers += [
        layer for layer in COPIED_LAYERS for name, origin in origins_of(layer).items()
        if origin in origins and (id(layer), name) not in known
    ]
    if strangers and len(wrappers_of(strangers, AveragedModel)):  # searched only where there are copies at all
        raise RankallocError(
            "there is an AveragedModel of this model whose adapters do not follow when triplets leave or change "
            "their basis; call controller.follow(averaged) before training"
        )


def _place(copy: Triplets) -> tuple[int, str]:
    """What is the same for every view of a driven layer's adapter, and of no other."""
    return (id(copy.layer), copy.adapter_name) if isinstance(copy, DrivenLayer) else (id(copy), "")


def drop(
    followed: Iterable[Adapters], adapters: Adapters, before: Sequence[torch.Tensor] | None, pins_dropped: bool
) -> None:
    """Drop in every copy what is dropped in ``adapters``.

    Args:
        before: the masks of until now, after an allocation.
        pins_dropped: whether dropped triplets are zero throughout, and those that come are new ones.
    """
    for copies in followed:
        for index, (copy, adapter) in enumerate(zip(copies, adapters, strict=True)):
            copy.drop(adapter.kept, erase=pins_dropped)
            if before is None:
                continue
            fresh = adapter.kept & ~before[index] if pins_dropped else torch.zeros_like(adapter.kept)
            _take_over(copy, adapter, fresh)


@torch.no_grad()
def _take_over(copy: Triplets, adapter: Triplets, fresh: torch.Tensor) -> None:
    """Triplets that have just come have no past to be averaged; nor has a factor that is not trained."""
    for (name, own, dims), (_, theirs, _) in zip(copy.factors(), adapter.factors(), strict=True):
        where = fresh.nonzero().flatten() if name in TRAINED[adapter.init] else torch.arange(adapter.rank)
        where = where.to(own.device)
        for dim in dims:
            own.index_copy_(dim, where, theirs.index_select(dim, where.to(theirs.device)).to(own))


def shrink(followed: Iterable[Adapters], in_memory: Sequence[torch.Tensor]) -> None:
    """Take out of memory what has left the trained adapters; ``in_memory`` are the masks (r,) of what stayed."""
    for copies in followed:
        for copy, mask in zip(copies, in_memory, strict=True):
            if not mask.all():
                copy.select(mask.nonzero().flatten().to(copy.kept.device))
        copies.resized()


@torch.no_grad()
def align(followed: Iterable[Adapters], adapters: Adapters) -> None:
    """Write every copy in the basis of ``adapters``, which have just been brought to canonical form; each copy's ΔW
    stays what it is.

    Raises:
        RankallocError: an average is not finite.
    """
    for copies in followed:
        for copy, adapter in zip(copies, adapters, strict=True):
            if not copy.is_finite():
                raise RankallocError(
                    "an averaged adapter's weights are not finite; make the average anew from weights that are"
                )
            if adapter.rank:
                _align(copy, adapter)


def _align(copy: Triplets, adapter: Triplets) -> None:
    p, _, q = (factor.parameter.to(copy.P.device).double() for factor in adapter.factors())
    left, right = _balanced(copy)
    # a triplet that is zero in the trained adapter has a direction to come near to as well
    trained = adapter.sizes().to(p)
    weight = (trained + 1e-3 * trained.max()).sqrt()
    of_p, of_q = p, q.T
    if adapter.sized_by_factors:
        of_p, of_q = (nn.functional.normalize(factor, dim=0) for factor in (of_p, of_q))
    turn, _, back = torch.linalg.svd(left.T @ (of_p * weight) + right.T @ (of_q * weight))
    left, right = left @ (turn @ back), right @ (turn @ back)
    sizes = left.norm(dim=0) * right.norm(dim=0)
    empty = sizes <= 1e-10 * sizes.max()  # as in the canonical form
    if adapter.sized_by_factors:
        copy.P.copy_(torch.where(empty, 0.0, left))
        copy.Q.copy_(torch.where(empty, q.T, right).T)
    else:
        copy.P.copy_(torch.where(empty, p, left / left.norm(dim=0)))
        copy.lam.copy_(torch.where(empty, 0.0, sizes))
        copy.Q.copy_(torch.where(empty, q.T, right / right.norm(dim=0)).T)
    copy.kept.copy_(adapter.kept)


def _balanced(copy: Triplets) -> tuple[torch.Tensor, torch.Tensor]:
    """U Σ^½ (d_out, r) and V Σ^½ (d_in, r) of the copy's P Λ Q, in float64."""
    q_p, r_p = torch.linalg.qr(copy.P.double())
    q_q, r_q = torch.linalg.qr(copy.Q.double().T)
    u, sigma, vh = torch.linalg.svd((r_p * copy.lam.double()) @ r_q.T, full_matrices=False)
    more = (0, copy.rank - len(sigma))  # a layer may be narrower than its rank
    return nn.functional.pad(q_p @ u * sigma.sqrt(), more), nn.functional.pad(q_q @ vh.T * sigma.sqrt(), more)
