"""Taking over the LoRA layers of a PeftModel, so that their ranks can be chosen while they train.

The model stays what it is: PEFT's layers compute the forward pass, and PEFT, transformers and TRL save, load, merge and
switch adapters as ever. What is taken over is the rank of each layer (:mod:`rankalloc.adapters.driven`) and what the
files say of it (:mod:`rankalloc.adapters.peft_files`).

Cost: none at a step beyond what the method scores. Weakness: plain LoRA's range of learning rates, and a launch for
each of A and B; :func:`rankalloc.attach` has a fused kernel and tolerates higher rates.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..errors import NotAdaptedError, TargetError, unknown
from ..layers.tuners import is_peft_model, is_tuner_layer
from .adapter import Adapter
from .adapter_set import Adapters
from .driven import DrivenLayer, factors_of
from .peft_files import install_hooks, layers_of, write_patterns

_STARTS = ("gaussian", "orthogonal", "eva")
"""Starts of PEFT's that leave the base weights alone, so that a file with fewer ranks is read as it was written."""


def adopt(model: nn.Module, adapter_name: str | None = None, *, dtype: torch.dtype | None = torch.float32) -> Adapters:
    """Let rankalloc choose the ranks of a PeftModel's own LoRA layers, in place.

    From now on ``save_pretrained`` and the Trainer's checkpoints describe each layer's present rank, and loading a
    checkpoint gives every layer the rank that was saved. Call it before the optimizer is made, and before a checkpoint
    is loaded. :class:`rankalloc.RankCallback` without adapters does so when its Trainer is made.

    Args:
        model: from ``peft.get_peft_model`` or ``peft.PeftModel.from_pretrained(..., is_trainable=True)``.
        adapter_name: which adapter; None for the active one.
        dtype: of the adapter's weights from now on. PEFT trains them in float32, and TRL casts them to bfloat16 beside
            a quantised base; each change of basis would then round the update by a quarter of a percent, and small
            steps would be lost. None leaves them as they are.

    Returns:
        The adapters, for :class:`rankalloc.RankController` or :class:`rankalloc.RankCallback`; names are the plain
        model's.

    Raises:
        TargetError: the model is no PeftModel, several adapters are active, or the adapter has something whose rank
            cannot change in place: another method than LoRA, DoRA or another variant, biases in B, a start that changed
            the base weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), whole parameters (``target_parameters``),
            convolutions, or tied layers; or it is merged. Nothing has been changed then.
        NotAdaptedError: its weights are frozen.

    Example:
        >>> import rankalloc as ra, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        >>> model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
        >>> adapters = ra.adopt(model)
        >>> adapters.ranks()
        {'0': 4, '2': 4}
    """
    peft: Any = _require_peft(model)
    name = _adapter(peft, adapter_name)
    config = peft.peft_config[name]
    _require_plain(config, name)
    layers = layers_of(model, name)
    for layer_name, layer in layers.items():
        if reason := _why_not(layer, name):
            raise TargetError(
                f"cannot choose the rank of {layer_name} in place: {reason}; leave it out of the LoraConfig, or use "
                "rankalloc.attach on the plain model"
            )
    _require_own_weights(layers, name)
    if not hasattr(config, "rankalloc_excluded"):
        # TRL gives its "ref" adapter the same object, and an orthogonal start wants an even rank
        own = copy.deepcopy(config)
        own.init_lora_weights = True if config.init_lora_weights == "orthogonal" else config.init_lora_weights
        own.rankalloc_excluded = config.exclude_modules
        peft.peft_config[name] = own
        install_hooks(model, name)
    modules = {layer_name: DrivenLayer(layer, name) for layer_name, layer in layers.items()}
    adapters = Adapters(
        peft.get_base_model(), dict(modules), _heads(peft, name), config.r, config.lora_alpha, "lora",
        scale="rslora" if config.use_rslora else "lora",
    )
    if dtype is not None:
        adapters.train_in(dtype)
    adapters.on_resize.append(lambda: write_patterns(model, name))
    return adapters


def _require_peft(model: nn.Module) -> nn.Module:
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise TargetError(
            "this model has rankalloc's own adapters: give those to the RankController or RankCallback; adopt is for "
            "the LoRA layers of a PeftModel"
        )
    name = type(model).__name__
    if not is_peft_model(model):
        inside = next((n for n, part in model.named_modules() if is_peft_model(part)), None)
        if inside is not None:
            raise TargetError(f"this {name} wraps a PeftModel; adopt that one, before it is wrapped")
        if any(is_tuner_layer(module) for module in model.modules()):
            raise TargetError(
                f"this {name} has PEFT layers and is no PeftModel (add_adapter); make it with "
                "peft.get_peft_model(model, LoraConfig(...)) instead"
            )
        raise TargetError(
            f"this {name} has no LoRA layers to choose ranks for: make a PeftModel of it, with "
            "peft.get_peft_model(model, LoraConfig(...)) or the trainer's peft_config=, or use rankalloc.attach"
        )
    if not hasattr(model, "get_base_model") or name == "PeftMixedModel":
        raise TargetError(f"the adapters of a {name} are of several methods at once; use a PeftModel with one LoRA")
    return model


def _adapter(peft: Any, name: str | None) -> str:
    if name is not None:
        if name not in peft.peft_config:
            raise TargetError(unknown("adapter", name, peft.peft_config))
        return name
    active = peft.active_adapters if isinstance(peft.active_adapters, list) else [peft.active_adapter]
    if len(active) != 1:
        raise TargetError(
            f"several adapters are active ({', '.join(active)}), and one can be driven: pass adapter_name, or activate "
            "one with set_adapter"
        )
    return active[0]


def _require_plain(config: Any, name: str) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise TargetError(
            f"adapter {name!r} is of PEFT's method {kind}, and ranks change in place in LORA alone; use a LoraConfig"
        )
    start = config.init_lora_weights
    if isinstance(start, str) and start not in _STARTS:
        raise TargetError(
            f"adapter {name!r} begins with init_lora_weights={start!r}, which depends on r and the base weights, so a "
            f"file with fewer ranks would be read wrongly; use True, False, {', '.join(map(repr, _STARTS))}"
        )
    if getattr(config, "target_parameters", None):
        raise TargetError(
            f"adapter {name!r} adapts whole parameters (target_parameters={list(config.target_parameters)}), whose "
            "experts share one A and B; leave them out, or use target_modules"
        )


def _why_not(layer: Any, name: str) -> str | None:
    """Why the rank of this layer cannot change in place, in a few words; None when it can."""
    if layer.merged:
        return "its adapter is merged into the base weight (call unmerge_adapter first)"
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__
        return f"it is a variant of LoRA ({'DoRA' if layer.use_dora.get(name) else variant})"
    if layer.lora_bias.get(name):
        return "its B has a bias (lora_bias=True)"
    if name in layer.lora_A:
        a, b = layer.lora_A[name], layer.lora_B[name]
        if type(a) is not nn.Linear or type(b) is not nn.Linear:
            return f"its A is a {type(a).__name__}, and ranks change in place in linear layers and embeddings alone"
    elif name not in layer.lora_embedding_A:
        return f"a {type(layer).__name__} keeps its factors in a way that is not known here"
    return None


def _require_own_weights(layers: dict[str, Any], name: str) -> None:
    if not layers:
        raise TargetError(f"adapter {name!r} adapts no layer; check the LoraConfig's target_modules")
    owners: dict[int, str] = {}
    for layer_name, layer in layers.items():
        for factor in factors_of(layer, name):
            if not factor.requires_grad:
                raise NotAdaptedError(
                    f"adapter {name!r} is frozen ({layer_name}), so its ranks cannot be learned; load it with "
                    "is_trainable=True, or activate it with set_adapter"
                )
            other = owners.setdefault(id(factor), layer_name)
            if other != layer_name:
                raise TargetError(
                    f"{other} and {layer_name} share their LoRA weights (ensure_weight_tying), so neither can change "
                    "its rank alone; leave one of them out"
                )


def _heads(peft: Any, name: str) -> dict[str, nn.Module]:
    """{name in the plain model: module} of what PEFT trains whole (modules_to_save)."""
    return {
        module_name: module.modules_to_save[name] for module_name, module in peft.get_base_model().named_modules()
        if name in getattr(module, "modules_to_save", ())
    }
