"""Putting a mixture into a model, and what the model then saves.

Everything is checked before the model is changed. With a mixture inside, ``model.save_pretrained`` of a transformers
model, and so a Trainer, writes the mixture and not the base (:mod:`rankalloc.storage.mixture_folder`); into a
``checkpoint-N`` it also writes what a Trainer resumes from (:mod:`rankalloc.storage.trained_state`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapter_set import parents_in
from ..adapters.gates import ACTIVATIONS, MODEL_GATE, Gate, ModelGate, Prompted, forget_inputs, read_inputs
from ..adapters.mixed import MixedHead, MixedLayer, gate_width
from ..errors import AdapterFileError, ConfigError, TargetError
from ..layers import quantized
from ..layers.adaptable import kind_of
from ..layers.kinds import LINEAR
from ..layers.tied import partners
from ..options import choice
from ..storage.heads import check_head
from ..storage.mixture_folder import GATES, OF_MODEL, MixtureParts
from ..storage.model_saving import CHECKPOINT
from ..storage.trained_state import prepare_to_load, same_values, trained_state, write_trained_state
from .mixture import Mixture

_METHOD = "save_pretrained"
_PREPARE = "prepare_inputs_for_generation"


def put_in(model: nn.Module, parts: MixtureParts, label: str) -> Mixture:
    """Put a mixture of these parts into ``model``, with gates at their start or as they are given.

    Args:
        label: of the parts, in messages.

    Raises:
        ConfigError: the kind of gate, or its activation, does not exist.
        TargetError: one gate for all layers is asked of a model that has no token embeddings or does not show them; a
            head shares its weight.
        AdapterFileError: a layer or a head does not fit the model.
    """
    choice("gate", parts.gate, GATES)
    choice("activation", parts.activation, ACTIVATIONS)
    modules = dict(model.named_modules())
    layers = {name: updates for name, updates in parts.layers.items() if any(update.rank for update in updates)}
    if parts.gate == OF_MODEL:
        _require_one_gate(model, layers)
    _check_heads(model, modules, parts, label)
    widths = {name: gate_width(modules[name]) for name in [*layers, *parts.mixed_heads]}
    if parts.gate == OF_MODEL:
        widths = {OF_MODEL: _embedding_of(model).embedding_dim}
    for name, (weight, _) in parts.gates.items():
        if name in widths and weight.shape[1] != widths[name]:
            raise AdapterFileError(
                f"{label} was made for another model: the gate of {name} looks at {weight.shape[1]} features in it and "
                f"at {widths[name]} here"
            )

    mixture = Mixture(
        model, parts.adapters, parts.gate, parts.activation, {}, {},
        trainable_before={name for name, p in model.named_parameters() if p.requires_grad},
    )
    shared: ModelGate | None = None
    if parts.gate == OF_MODEL:
        device = _embedding_of(model).weight.device
        shared = ModelGate(_gate(widths[OF_MODEL], parts, OF_MODEL, device), _generates(model))
        shared.train(model.training)
    parents = parents_in(model)
    for name in [*layers, *parts.mixed_heads]:
        base: Any = modules[name]
        own = None if shared is not None else _gate(widths[name], parts, name, base.weight.device)
        if name in layers:
            mixture.layers[name] = MixedLayer(base, name, layers[name], own, shared)
        else:
            mixture.heads[name] = MixedHead(base, name, *parts.mixed_heads[name], own, shared)
        for parent, attribute in parents.get(id(base), ()):
            parent._modules[attribute] = mixture.layers[name] if name in layers else mixture.heads[name]
    for name, state in parts.heads.items():
        modules[name].load_state_dict(state)
        mixture.heads[name] = modules[name]
    if shared is not None:
        _ask(model, shared)
    _save_as_mixture(model, mixture)
    quantized.let_trainer_train(model)
    return mixture


def _gate(width: int, parts: MixtureParts, name: str, device: torch.device) -> Gate:
    gate = Gate(width, len(parts.adapters), parts.activation, device)
    if name in parts.gates:
        weight, bias = parts.gates[name]
        gate.load_state_dict({"weight": weight, "bias": bias})
    return gate


def _ask(model: Any, shared: ModelGate) -> None:
    """Let the gate read what the model is called with."""
    setattr(model, MODEL_GATE, shared)
    model.register_forward_pre_hook(read_inputs, with_kwargs=True)
    model.register_forward_hook(forget_inputs, always_call=True)
    if shared.causal:
        setattr(model, _PREPARE, Prompted(model))


def _embedding_of(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None  # a model of another kind


def _generates(model: Any) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else False


def _require_one_gate(model: Any, layers: Mapping[str, Any]) -> None:
    """Raise TargetError for a model whose tokens one gate cannot see, or whose layers it cannot serve."""
    way_out = "mix with gate='layer', which gives every layer a gate over its own input"
    embedding = _embedding_of(model)
    if not isinstance(embedding, nn.Embedding):  # of which the gate reads the weight alone, whatever it is scaled by
        raise TargetError(
            f"gate='model' looks at token embeddings, and this {type(model).__name__} has none; {way_out}"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TargetError(
            f"gate='model' looks at one text, and a {type(model).__name__} reads two, its encoder's apart from the "
            f"rest when it generates; {way_out}"
        )
    routed = [name for name in layers if ".experts." in name]
    if routed:
        raise TargetError(
            f"gate='model' weighs whole texts, and {routed[0]} is called with the tokens of several that were routed "
            f"to it; {way_out}"
        )
    output = model.get_output_embeddings() if _generates(model) else None
    adapted = [name for name in layers if model.get_submodule(name) is output and output is not None]
    if adapted:
        raise TargetError(
            f"gate='model' weighs every token of a text, and {adapted[0]} is called with some of them when the model "
            f"generates; {way_out}"
        )


def _check_heads(model: nn.Module, modules: Mapping[str, nn.Module], parts: MixtureParts, label: str) -> None:
    states: dict[str, Mapping[str, torch.Tensor]] = {
        name: {"weight": weight[0]} | ({} if bias is None else {"bias": bias[0]})
        for name, (weight, bias) in parts.mixed_heads.items()
    }
    for name, state in (parts.heads | states).items():
        if name not in modules:
            raise AdapterFileError(f"{label} was made for another model: it holds {name}, and this model has no {name}")
        if name in states and kind_of(modules[name]) not in LINEAR:
            raise AdapterFileError(f"{label}: {name} is a {type(modules[name]).__name__} here, which cannot be mixed")
        check_head(name, state, modules[name], label)
        if shared := partners(model, name):
            raise TargetError(
                f"{name}, which the adapters trained whole, shares its weight with {shared[0]} here; untie them first, "
                "or leave the heads out (heads='none')"
            )


def _save_as_mixture(model: Any, mixture: Mixture) -> None:
    mixture.undo.append(prepare_to_load(model))
    if callable(getattr(type(model), _METHOD, None)):
        setattr(model, _METHOD, MixtureSaver(mixture))

    def undo() -> None:
        for method in (_METHOD, _PREPARE):
            vars(model).pop(method, None)

    mixture.undo.append(undo)


class MixtureSaver:
    """The ``save_pretrained`` of a model that holds a mixture."""

    __name__ = _METHOD

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **others: Any,
    ) -> None:
        """Write the mixture into the folder ``save_directory``, as :meth:`Mixture.save` does.

        Args:
            is_main_process: False writes nothing.
            state_dict: of the model or of what wraps it; the weights written are the model's own.
            others: arguments of the class's own method, which mean nothing to a mixture.

        Raises:
            ConfigError: an argument asks for something else than a folder with this mixture, or the folder holds
                another adapter or a model.
            RankallocError: the folder cannot be written.
        """
        if push_to_hub:
            raise ConfigError(
                "save_pretrained(push_to_hub=True) is not possible with a mixture in the model; save it to a folder "
                "and upload that"
            )
        mixture, state = self.mixture, state_dict or {}
        prefix = _prefix_of(f"{next(iter(mixture.layers))}.lam", state)
        heads = mixture.plain_heads()
        if not same_values(trained_state(mixture.model, heads), state, prefix):
            raise ConfigError(
                "save_pretrained got a state_dict= with other weights than the model has; put them into the model "
                "first (model.load_state_dict(...)), then save"
            )
        if not is_main_process:
            return
        folder = mixture.save(Path(save_directory))
        if CHECKPOINT.fullmatch(folder.name):
            write_trained_state(mixture.model, heads, folder, prefix)


def _prefix_of(own: str, state: Mapping[str, Any]) -> str:
    """What wrappers, such as torch.compile, put before the model's names in ``state``."""
    return next((name.removesuffix(own) for name in state if name == own or name.endswith(f".{own}")), "")
