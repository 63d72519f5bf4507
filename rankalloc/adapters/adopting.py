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
from ..layers.tuners import holds_adapters, plain_model
from .adapter import Adapter
from .adapter_set import Adapters
from .attaching import said_of_full_ranks
from .driven import DrivenLayer, factors_of, origins_of
from .peft_files import install_hooks, layers_of, write_patterns

_STARTS = ("gaussian", "orthogonal", "eva")
"""Starts of PEFT's that leave the base weights alone, so that a file with fewer ranks is read as it was written."""


def adopt(model: nn.Module, adapter_name: str | None = None, *, dtype: torch.dtype | None = torch.float32) -> Adapters:
    """Let rankalloc choose the ranks of a PeftModel's own LoRA layers, in place.

    From now on ``save_pretrained`` and the Trainer's checkpoints describe each layer's present rank, and loading a
    checkpoint gives every layer the rank that was saved. Call it before the optimizer is made, and before a checkpoint
    is loaded. :class:`rankalloc.RankCallback` without adapters does so when its Trainer is made.

    Three things around such a model need another way: PEFT's ``hotswap_adapter`` swaps adapters of the same ranks alone
    (for others give it folders of :func:`rankalloc.save`, with one rank for all layers); TRL's DPO and GRPO copy the
    adapter of a PeftModel as their reference, which fails where a layer has lost all ranks in this process (save it,
    and load it with ``is_trainable=True`` first); and transformers' Trainer resumes no model with ``add_adapter``, ours
    or not (use ``get_peft_model``; sentence-transformers resumes them).

    Args:
        model: from ``peft.get_peft_model`` or ``peft.PeftModel.from_pretrained(..., is_trainable=True)``; a model of
            transformers with ``add_adapter``; or what holds one of these, as a SentenceTransformer does.
        adapter_name: which adapter; None for the active one.
        dtype: of the adapter's weights from now on. PEFT trains them in float32, and TRL casts them to bfloat16 beside
            a quantised base; each change of basis would then round the update by a quarter of a percent, and small
            steps would be lost. None leaves them as they are.

    Returns:
        The adapters, for :class:`rankalloc.RankController` or :class:`rankalloc.RankCallback`; names are the plain
        model's.

    Raises:
        TargetError: the model has no adapters of PEFT's, several of them are active, or the adapter has something whose
            rank cannot change in place: another method than LoRA, DoRA or another variant, biases in B, a start that
            changed the base weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), biases that train, whole parameters
            (``target_parameters``), convolutions, nn.MultiheadAttention, or tied layers; or it is merged, or has
            learned at a rank above a side of its layer. Nothing has been changed then.
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
    layers = layers_of(peft, name)
    for layer_name, layer in layers.items():
        if found := _why_not(layer, name):
            reason, way_out = found
            raise TargetError(
                f"cannot choose the rank of {layer_name} in place: {reason}; {way_out}, or use rankalloc.attach on the "
                "plain model"
            )
    _require_own_weights(layers, name)
    _require_room(layers, name)
    # the user's object stays as it is (TRL gives it to a "ref" adapter too), and an orthogonal start wants an even rank
    own = peft.peft_config[name] = copy.deepcopy(config)
    own.init_lora_weights = True if config.init_lora_weights == "orthogonal" else config.init_lora_weights
    if not any(name in origins_of(layer) for layer in layers.values()):
        own.rankalloc_excluded = config.exclude_modules
        install_hooks(peft, name)
    modules = {layer_name: DrivenLayer(layer, name) for layer_name, layer in layers.items()}
    full = {layer_name: rank for layer_name, driven in modules.items() if (rank := _at_full_rank(driven))}
    notes = said_of_full_ranks(full, config.r)
    adapters = Adapters(
        plain_model(peft), dict(modules), _heads(peft, name), config.r, config.lora_alpha, "lora",
        scale="rslora" if config.use_rslora else "lora", notes=notes,
    )
    if dtype is not None:
        adapters.train_in(dtype)
    adapters.on_resize.append(lambda: write_patterns(peft, name))
    if notes:
        adapters.resized()
    extras = [key for key in ("trainable_token_indices", "layer_replication") if getattr(config, key, None)]
    adapters.beyond = f"{' and '.join(extras)} of the LoraConfig" if extras else ""
    return adapters


def _require_peft(model: nn.Module) -> nn.Module:
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise TargetError(
            "this model has rankalloc's own adapters: give those to the RankController or RankCallback; adopt is for "
            "the LoRA layers of a PeftModel"
        )
    name, hosts = type(model).__name__, _hosts(model)
    if not hosts:
        raise TargetError(
            f"this {name} has no LoRA layers to choose ranks for: make a PeftModel of it, with "
            "peft.get_peft_model(model, LoraConfig(...)) or the trainer's peft_config=, or use rankalloc.attach"
        )
    if len(hosts) > 1:
        places = ", ".join(hosts)
        raise TargetError(f"several parts of this {name} have adapters of PEFT's ({places}); adopt one of them")
    ((place, host),) = hosts.items()
    if place and hasattr(model, "module"):  # DDP and its kin have seen the parameters as they were
        raise TargetError(f"this {name} wraps a {type(host).__name__}; adopt that one, before it is wrapped")
    if type(host).__name__ == "PeftMixedModel":
        raise TargetError(f"the adapters of a {name} are of several methods at once; use a PeftModel with one LoRA")
    return host


def _hosts(model: nn.Module) -> dict[str, nn.Module]:
    """{name: module} of the outermost parts of ``model`` that PEFT's adapters are trained and saved through."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if holds_adapters(module) and not any(not outer or name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _adapter(peft: Any, name: str | None) -> str:
    if name is not None:
        if name not in peft.peft_config:
            raise TargetError(unknown("adapter", name, peft.peft_config))
        return name
    active = peft.active_adapters() if callable(peft.active_adapters) else peft.active_adapters
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
    if config.bias != "none":
        raise TargetError(
            f"adapter {name!r} trains biases (bias={config.bias!r}), and PEFT would not find that of a layer without a "
            "rank in the file again; set bias='none'"
        )
    if getattr(config, "target_parameters", None):
        raise TargetError(
            f"adapter {name!r} adapts whole parameters (target_parameters={list(config.target_parameters)}), whose "
            "experts have one rank; leave them out, or use rankalloc.attach, which gives each expert ranks of its own"
        )


def _why_not(layer: Any, name: str) -> tuple[str, str] | None:
    """Why the rank of this layer cannot change in place, and what to do; None when it can."""
    leave_out = "leave the layer out of target_modules"
    if type(layer.get_base_layer()).__name__ == "MultiheadAttention":
        return "PEFT builds the projections of an nn.MultiheadAttention with one rank, whatever patterns say", leave_out
    if layer.merged:
        return "its adapter is merged into the base weight", "call unmerge_adapter first"
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__
        if layer.use_dora.get(name):
            return "it is a DoRA layer", "set use_dora=False"
        return f"it is a variant of LoRA ({variant})", "leave that option out of the LoraConfig"
    if layer.lora_bias.get(name):
        return "its B has a bias", "set lora_bias=False"
    if name in layer.lora_A:
        a, b = layer.lora_A[name], layer.lora_B[name]
        if type(a) is not nn.Linear or type(b) is not nn.Linear:
            where = "ranks change in place in linear layers and embeddings alone"
            return f"its A is a {type(a).__name__}, and {where}", leave_out
    elif name not in layer.lora_embedding_A:
        return f"a {type(layer).__name__} keeps its factors in a way that is not known here", leave_out
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


def _require_room(layers: dict[str, Any], name: str) -> None:
    """Raise TargetError for a layer that has learned at a rank above its shorter side, where no update has so many."""
    for layer_name, layer in layers.items():
        a, b = factors_of(layer, name)
        if len(a) > min(a.shape[1], len(b)) and b.any():
            raise TargetError(
                f"{layer_name} has learned at rank {len(a)}, above min(d_in, d_out) = {min(a.shape[1], len(b))}; load "
                "the adapter with rankalloc.load, which reduces that exactly, or train it anew with a lower r"
            )


def _at_full_rank(driven: DrivenLayer) -> int | None:
    """Cut a layer whose rank is above its shorter side to that, before it has learned; the rank then, or None."""
    highest = min(driven.d_in, driven.d_out)
    if driven.rank <= highest:
        return None
    driven.select(torch.arange(highest, device=driven.P.device))
    driven.initial_rank = highest
    return highest


def _heads(peft: Any, name: str) -> dict[str, nn.Module]:
    """{name in the plain model: module} of what PEFT trains whole (modules_to_save)."""
    return {
        module_name: module.modules_to_save[name] for module_name, module in plain_model(peft).named_modules()
        if name in getattr(module, "modules_to_save", ())
    }
