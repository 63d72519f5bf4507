"""Adapters of experts whose weights are stacked in one parameter: ΔW_e = s·P_e·Λ_e·Q_e for each expert e.

No expert is a module that could be wrapped, so the module of all experts is:

    mlp.experts     AdaptedExperts(base_layer=experts, gate_up_proj=[Adapter of expert 0, 1, ...], down_proj=[...])

It runs the experts' own forward pass with W + ΔW in place of W, whatever implementation transformers has chosen for it
(a loop, batched or grouped products), as PEFT does for its ``target_parameters``. Ranks are ragged: every expert has
its own, and one without a rank costs nothing but its place in W.

Cost: a forward pass in training forms W + ΔW, a copy of the adapted stacks that stays until the backward pass, and its
gradient; gradient checkpointing keeps both to one block at a time. Weakness: dropout on the inputs of one expert's
update cannot be expressed, so there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..layers.experts import ExpertMatrix, Traffic, expert_of, stack_of
from .adapter import Adapter


class ExpertAdapter(Adapter):
    """The update of one expert's matrix; :class:`AdaptedExperts` computes with it."""

    base_layer: ExpertMatrix

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight


class AdaptedExperts(nn.Module):
    """A module of experts and the updates of its stacked weights.

    Args:
        base_layer: the frozen module of the experts.
        updates: {name of a stacked parameter: adapters of its experts, all of them or some}.
    """

    def __init__(self, base_layer: nn.Module, updates: Mapping[str, Sequence[ExpertAdapter]]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapted = tuple(updates)
        self.traffic = Traffic(max(len(getattr(base_layer, parameter)) for parameter in updates))
        for parameter, adapters in updates.items():
            # not add_module, which finds the experts' own parameter under that name
            self._modules[parameter] = nn.ModuleDict({str(a.base_layer.expert): a for a in adapters})
            for adapter in adapters:
                adapter.base_layer.traffic = self.traffic
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        # what other code reads from the experts it thinks it has
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self._modules.get("base_layer")
            if base is None:
                raise
            return getattr(base, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.traffic.watched and self.training:
            self.traffic.count([*args, *kwargs.values()])
        changed = {}
        for parameter in self.adapted:
            adapters: Any = self._modules[parameter]
            weight = self._changed(getattr(self.base_layer, parameter), adapters.values())
            if weight is not None:
                changed[parameter] = weight
        if not changed:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, changed, args, kwargs)

    def _changed(self, stack: torch.Tensor, adapters: Iterable[ExpertAdapter]) -> torch.Tensor | None:
        """W + ΔW in the stack's own dtype; None when no expert has a rank."""
        layers = {adapter.base_layer.expert: adapter.layer() for adapter in adapters if adapter.rank}
        if not layers:
            return None
        experts, factors = list(layers), [layer.factors for layer in layers.values()]
        # few operators for many experts, of which those with a lower rank are padded with zeros
        b = _together([p.T for p, _, _ in factors])
        a = _together([q for _, _, q in factors])
        lam = _together([lam * layer.scaling for (_, lam, _), layer in zip(factors, layers.values(), strict=True)])
        b = b * lam[:, :, None]
        if getattr(self.base_layer, "is_transposed", False):
            a, b = b, a
        delta = torch.bmm(b.transpose(1, 2), a).to(stack.dtype)
        if len(experts) == len(stack):
            return stack + delta
        return stack.index_add(0, torch.tensor(experts, device=stack.device), delta)


def _together(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """(r_e, …) of each expert as (experts, highest r, …)."""
    if len({len(row) for row in rows}) == 1:
        return torch.stack(list(rows))
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def wrap_experts(model: nn.Module, adapters: Mapping[str, ExpertAdapter]) -> None:
    """Put the adapters, by the full names of their matrices, around the modules of their experts."""
    owners: dict[str, dict[str, list[ExpertAdapter]]] = {}
    for name in sorted(adapters, key=expert_of):
        owner, _, parameter = stack_of(name).rpartition(".")
        owners.setdefault(owner, {}).setdefault(parameter, []).append(adapters[name])
    for owner, updates in owners.items():
        base = model.get_submodule(owner)
        order = [n for n, _ in base.named_parameters(recurse=False) if n in updates]
        _replace(model, base, AdaptedExperts(base, {n: updates[n] for n in order}))


def unwrap_experts(model: nn.Module) -> None:
    """Take every :class:`AdaptedExperts` out again."""
    for module in [module for module in model.modules() if isinstance(module, AdaptedExperts)]:
        _replace(model, module, module.base_layer)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    parents = [(parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is old]
    for parent, key in parents:
        if parent is not new:
            parent._modules[key] = new
