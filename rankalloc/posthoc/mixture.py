"""A mixture in a model: what :func:`rankalloc.mix` and :func:`rankalloc.load_mixture` return."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..adapters.adapter_set import Adapters, parents_in
from ..adapters.gates import MODEL_GATE, Gate, forget_inputs, read_inputs
from ..adapters.mixed import Gated, MixedHead, MixedLayer
from ..budget import RankBudget
from ..errors import ConfigError, RankallocError
from ..layers import quantized
from ..options import number
from ..storage import fingerprint
from ..storage.mixture_folder import OF_MODEL, MixtureParts, write_mixture
from ..storage.saving import save
from ..storage.trained_state import trained_state
from .gate_use import mean_over, watching
from .results import CutResult
from .weighted import as_adapters

_NOT_ONE = (
    "this is a mixture, whose update depends on the input, so it cannot be folded into the weights or taken for one "
    "adapter; keep it in the model, or fix its gates (mixture.fix) and export the one adapter that it is then"
)


TRAINED_PARTS = ("router", "scales", "heads")


def require_parts(parts: Sequence[str]) -> None:
    """Raise ConfigError unless ``parts`` are some of :data:`TRAINED_PARTS`."""
    given = [parts] if isinstance(parts, str) else [*parts]
    if not given or isinstance(parts, str) or not set(given) <= set(TRAINED_PARTS):
        raise ConfigError(f"what trains in a mixture is a list of some of {', '.join(TRAINED_PARTS)}, got {parts!r}")


@dataclass(eq=False)
class Mixture:
    """Several finished adapters in one model, weighed for each input by gates that learn.

    Attributes:
        model: the model.
        adapters: the names of the K adapters, in the order of the gates.
        gate: "layer" when every layer has a gate of its own, "model" when all share one.
        activation: "softmax" or "sigmoid".
        layers: {layer: its updates and gate}.
        heads: {module of a task head: itself, or what mixes those of the adapters}.
        cut: what was kept of each adapter, layer by layer (:class:`CutResult`, its layers called
            ``<adapter>: <layer>``); None when no budget was given, and after loading.
        trainable_before: names of the parameters that were trainable in the model before.
    """

    model: nn.Module
    adapters: list[str]
    gate: str
    activation: str
    layers: dict[str, MixedLayer]
    heads: dict[str, nn.Module]
    cut: CutResult | None = None
    trainable_before: set[str] = field(repr=False, default_factory=set)
    undo: list[Any] = field(repr=False, default_factory=list)
    """What takes back, at the end, what was done to the model besides."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "undo": []}

    def __repr__(self) -> str:
        return (
            f"Mixture({' + '.join(self.adapters)}: {len(self.layers)} layers, "
            f"{sum(sum(layer.ranks) for layer in self.layers.values())} ranks, {self.num_params():,} parameters, "
            f"gate={self.gate!r} of {self.gate_params():,})"
        )

    @property
    def gates(self) -> dict[str, Gate]:
        """{layer (or mixed head): its gate}, or {"model": the one of all layers}."""
        if self.gate == OF_MODEL:
            return {OF_MODEL: next(iter(self._gated().values())).gate_of()}
        return {name: layer.gate_of() for name, layer in self._gated().items()}

    def _gated(self) -> dict[str, Gated]:
        """Everything that a gate weighs, by name. Raises RankallocError once it was taken out of its model."""
        if not self.layers:
            raise RankallocError("this mixture was taken out of its model (detach): nothing is left of it here")
        return {**self.layers, **{name: head for name, head in self.heads.items() if isinstance(head, MixedHead)}}

    def ranks(self) -> dict[str, dict[str, int]]:
        """{adapter: {layer: rank kept}}."""
        return {
            adapter: {name: layer.ranks[k] for name, layer in self.layers.items()}
            for k, adapter in enumerate(self.adapters)
        }

    def num_params(self) -> int:
        """Parameters of all updates, d_in + d_out for each rank: what the budget counts. Gates are not in it."""
        return sum(sum(layer.ranks) * (layer.d_in + layer.d_out) for layer in self.layers.values())

    def gate_params(self) -> int:
        """Parameters of the gates."""
        return sum(p.numel() for gate in self.gates.values() for p in gate.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """What trains: the gates, or as :func:`rankalloc.mix` or :meth:`train_only` was told."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def train_only(self, *parts: str) -> Mixture:
        """Let exactly these parts train: "router" (the gates), "scales" (λ of every triplet), "heads".

        Raises:
            ConfigError: a part does not exist, or none is named, or there are no heads to train.
        """
        require_parts(parts)
        if "heads" in parts and not self.heads:
            raise ConfigError("these adapters have no task heads, so there are none to train; leave out 'heads'")
        self.model.requires_grad_(False)
        for gate in self.gates.values() if "router" in parts else ():
            gate.requires_grad_(True)
        for layer in self.layers.values() if "scales" in parts else ():
            layer.lam.requires_grad_(True)
        for head in self.heads.values() if "heads" in parts else ():
            own = [head.weights, head.biases] if isinstance(head, MixedHead) else [*head.parameters()]
            for parameter in own:
                if parameter is not None and parameter.is_floating_point():
                    parameter.requires_grad_(True)
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{name in the model's state: tensor} of everything that is the mixture's own: updates, gates, heads."""
        return {name: tensor.detach().clone() for name, tensor in trained_state(self.model, self.plain_heads()).items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take a :meth:`state_dict` of the same mixture.

        Raises:
            ConfigError: it is of another mixture; nothing has been changed then.
        """
        own = trained_state(self.model, self.plain_heads())
        for name in [*own, *state]:
            shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (state, own)]
            if shapes[0] != shapes[1]:
                raise ConfigError(
                    f"this state is of another mixture: {name} is {shapes[0] or 'missing'} in it and "
                    f"{shapes[1] or 'missing'} here; mix the same adapters with the same budget and gate"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def plain_heads(self) -> list[nn.Module]:
        """Task heads that are the model's own modules, the same for every input."""
        return [head for head in self.heads.values() if not isinstance(head, MixedHead)]

    def watching(self) -> AbstractContextManager[dict[str, list[torch.Tensor]]]:
        """The gates of every call inside a ``with``: {layer, or "model": [(…, K), ...]}."""
        gated = self._gated()
        return watching({OF_MODEL: next(iter(gated.values()))} if self.gate == OF_MODEL else gated)

    def mean_gates(self, batches: Iterable[Any]) -> dict[str, torch.Tensor]:
        """{layer, or "model": the mean gates (K,) over these inputs, in float64}; padding does not count.

        Args:
            batches: mappings that the model is called with, or what it takes as its one argument. Positions masked by
                ``attention_mask`` are left out where there are gates for each.

        Raises:
            ConfigError: there are no batches.
        """
        with self.watching() as seen:
            return mean_over(self.model, seen, len(self.adapters), batches)

    def fix(self, gates: Sequence[float] | torch.Tensor | Mapping[str, Sequence[float] | torch.Tensor]) -> Mixture:
        """Give every input the same gates: K numbers for all layers, or {layer, or "model": K numbers}, as
        :meth:`mean_gates` returns them.

        Raises:
            ConfigError: a name or a number of them is wrong, or they are no gates: parts of 1 for a softmax, each from
                0 to 1 for a sigmoid. Nothing has been changed then.
        """
        own = self.gates
        given = gates if isinstance(gates, Mapping) else dict.fromkeys(own, gates)
        if given.keys() != own.keys():
            odd = sorted(given.keys() ^ own.keys())[0]
            raise ConfigError(f"the gates to fix are those of {', '.join([*own][:3])}, …; {odd!r} is in one alone")
        settled = {name: self._settled(values) for name, values in given.items()}
        for name, values in settled.items():
            own[name].fix(values)
        return self

    def _settled(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        numbers = [number("a gate", float(value), 0, 1) for value in values]
        if len(numbers) != len(self.adapters):
            raise ConfigError(f"there are {len(self.adapters)} adapters, and {len(numbers)} gates were given")
        if self.activation == "softmax" and abs(sum(numbers) - 1) > 1e-6:
            raise ConfigError(f"the gates of a softmax are parts of 1, and {numbers} add up to {sum(numbers):g}")
        return torch.tensor(numbers, dtype=torch.float64)

    def constant(self) -> dict[str, torch.Tensor] | None:
        """{layer (or mixed head): its gates (K,)} when they are the same for every input; None when they are not."""
        found = {name: layer.gate_of().constant() for name, layer in self._gated().items()}
        settled = {name: gates for name, gates in found.items() if gates is not None}
        return settled if len(settled) == len(found) else None

    def combined(self, budget: RankBudget | None = None) -> Adapters:
        """The one plain LoRA that the mixture is while its gates are constant, Σ_k g_k ΔW_k in every layer.

        It is truncated to ``budget`` as :func:`rankalloc.compose` does; None keeps all that is more than rounding.

        They are not in the model: :func:`rankalloc.save` writes them.

        Raises:
            RankallocError: the gates depend on the input.
            BudgetError: the budget cannot be met.
        """
        gates = self.constant()
        if gates is None:
            raise RankallocError(
                "the gates of this mixture depend on the input, so no single adapter computes what it does; save the "
                "mixture itself (mixture.save), or give its gates one value first: "
                "mixture.fix(mixture.mean_gates(batches)) takes their mean over your data"
            )
        modules = as_adapters(self.layers, gates, budget)
        heads = {
            name: head.linear(gates[name]) if isinstance(head, MixedHead) else head
            for name, head in self.heads.items()
        }
        top = max([1, *(adapter.rank for adapter in modules.values())])
        return Adapters(self.model, dict(modules), heads, top, top, "lora")

    def export(self, path: str | os.PathLike, budget: RankBudget | None = None, **options: Any) -> Path:
        """Write :meth:`combined` into the folder ``path``; ``options`` are those of :func:`rankalloc.save`.

        Raises:
            RankallocError: the gates depend on the input, or the folder cannot be written.
            BudgetError: the budget cannot be met.
        """
        return save(self.combined(budget), path, **{"layout": "compact", **options})

    def parts(self) -> MixtureParts:
        """What the mixture is made of, as a file holds it."""
        gates = self.gates
        base = fingerprint.fingerprint(self.model)
        parts = MixtureParts(
            self.adapters, self.gate, self.activation, {name: layer.updates() for name, layer in self.layers.items()},
            base=fingerprint.name_of(self.model), fingerprint=None if base is None else base.encode(),
        )
        parts.gates = {name: (gate.weight.detach(), gate.bias.detach()) for name, gate in gates.items()}
        for name, head in self.heads.items():
            if isinstance(head, MixedHead):
                parts.mixed_heads[name] = head.weights, head.biases
            else:
                parts.heads[name] = head.state_dict()
        return parts

    def save(self, path: str | os.PathLike) -> Path:
        """Write the mixture into the folder ``path``, for :func:`rankalloc.load_mixture`
        (:mod:`rankalloc.storage.mixture_folder`).

        Raises:
            ConfigError: the folder holds a plain adapter, a model or a run.
            RankallocError: it cannot be written; its content is unchanged then.
        """
        return write_mixture(self.parts(), path)

    def detach(self) -> nn.Module:
        """Take the mixture out and return the model: its layers are as they were, task heads that were mixed too."""
        parents = parents_in(self.model)
        for part in self._gated().values():
            for parent, attribute in parents.get(id(part), ()):
                parent._modules[attribute] = part.base_layer
        for hooks, own in ((self.model._forward_pre_hooks, read_inputs), (self.model._forward_hooks, forget_inputs)):
            for key in [key for key, hook in hooks.items() if hook is own]:
                del hooks[key]
        self.model._modules.pop(MODEL_GATE, None)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trainable_before)
        for undo in self.undo:
            undo()
        self.undo.clear()
        self.layers.clear()
        self.heads.clear()
        quantized.take_back(self.model)
        return self.model

    def own(self, way_out: str) -> dict[str, Adapter]:
        """What :func:`rankalloc.merge` asks adapters for. Always raises RankallocError."""
        raise RankallocError(_NOT_ONE)

    def check_adapted(self) -> None:
        """What :func:`rankalloc.save` asks adapters for. Always raises RankallocError."""
        raise RankallocError(_NOT_ONE + "; mixture.save(path) writes the mixture itself")
