"""Saving the adapters of a model as plain LoRA: lora_A = Q, lora_B = P·(Λ·s).

:mod:`rankalloc.storage.layout` describes the layouts, :mod:`rankalloc.layers.kinds` the tensors of embeddings and
convolutions.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapter_set import Adapters
from ..adapters.triplets import BOTTLENECK, Triplets
from ..budget import BudgetPlan
from ..errors import ConfigError, RankallocError
from ..layers.experts import stack_of
from ..layers.tied import partners
from . import fingerprint
from .bottleneck_folder import write_bottlenecks
from .experts import pack_stack, stacked
from .folder import NESTED_KEY, LayerToWrite, Stored, lora_config, require_taken_by, stored_size, write_folder
from .layout import Layout
from .peft_names import KEY, as_parameters, is_parameter
from .readers import layout_for

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForQuestionAnswering": "QUESTION_ANS",
}
WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Task types for which PEFT expects a head in the file, and fails without one."""


def save(
    adapters: Adapters, path: str | os.PathLike, layout: str | None = None, *, pad_multiple: int = 1,
    reader: str | None = None,
) -> Path:
    """Write the adapters as plain LoRA into the folder ``path``: exactly the function that they compute now.

    Task heads that were trained along are written as PEFT's modules_to_save. Bottlenecks, which are no LoRA, have a
    format of their own (:mod:`rankalloc.storage.bottleneck_folder`).

    Args:
        adapters: may be saved at any moment of a run; dropped triplets that grew back are included.
        path: folder; it is made if missing, and other files in it are left alone.
        layout: "compact" (None), as small as the adapters, or "uniform" or "one-alpha"; see
            :mod:`rankalloc.storage.layout`.
        pad_multiple: in the uniform layout, round the one rank up to a multiple of this.
        reader: in the place of both, the tool that it is for: a key of :data:`rankalloc.READERS`.

    Raises:
        ConfigError: there is no such layout or reader, or the reader reads no folder or cannot take these adapters.
        NotAdaptedError: a method was to choose ranks for these adapters and never did.
        RankallocError: the folder cannot be written; its old content is unchanged then.

    Warns of convolutions that PEFT would compute differently (dilated ones, or ones with a padding mode).
    """
    adapters.check_adapted()
    if not adapters.modules:
        raise RankallocError("these adapters were taken out of their model (detach or merge): nothing is left to save")
    if adapters.beyond:
        raise RankallocError(
            f"plain LoRA is not all that trains here: {adapters.beyond} would be missing from the file; save with "
            "model.save_pretrained"
        )
    if adapters.init == BOTTLENECK:
        if layout is not None or pad_multiple != 1 or reader is not None:
            raise ConfigError(
                "bottlenecks are no LoRA and have one format, which rankalloc alone reads; leave layout, padding and "
                "reader out"
            )
        return write_bottlenecks(adapters, path, _states(adapters))
    written = layout_for(layout, pad_multiple, reader)
    for note in caveats(adapters):
        warnings.warn(note, stacklevel=2)
    layers, factors = _layers_of(adapters)
    heads = _states(adapters)
    base = fingerprint.fingerprint(adapters)
    about = {} if base is None else {fingerprint.KEY: base.encode()}
    if adapters.nested:
        about[NESTED_KEY] = f"{adapters.cut_exponent:g}"
    return write_folder(
        path, layers, factors.__getitem__, heads, lambda names, rank: _config(adapters, names, rank), written, about
    )


def require_reader(adapters: Adapters, layout: Layout) -> None:
    """Make sure, before training, that the reader the layout is for takes these adapters, whatever their ranks.

    Raises:
        ConfigError: it cannot take a module of theirs, or would leave out layers.
    """
    require_taken_by(layout, _layers_of(adapters)[0], saved_whole(adapters))


def stored_of(adapters: Adapters, layout: Layout) -> Stored:
    """What :func:`save` would store of the adapters as they are now. Padding is all that is more than they have: zeros
    up to one rank, or to the highest of a stack's experts, and factors that a file repeats for groups."""
    if adapters.init == BOTTLENECK:
        size = adapters.num_params()
        return Stored(BOTTLENECK, "", max(adapters.ranks().values()), size, 0, size * adapters.bytes_per_param(), 0)
    found = stored_size(_layers_of(adapters)[0], layout)
    held = adapters.num_params()
    return replace(
        found, padding=found.numbers - held, padding_bytes=found.bytes - held * adapters.bytes_per_param()
    )


def most_stored(adapters: Adapters, plan: BudgetPlan, layout: Layout) -> int:
    """The most numbers that :func:`save` can store once these adapters meet ``plan``, whose ranks are not known yet."""
    layers, _ = _layers_of(adapters)
    highest: dict[str, int] = {}
    for name, cost, cap in zip(adapters.modules, plan.costs, plan.caps, strict=True):
        stored_as = name if name in layers else stack_of(name)
        highest[stored_as] = max(highest.get(stored_as, 0), min(cap, plan.target // cost))
    worst = stored_size({name: replace(layer, rank=highest[name]) for name, layer in layers.items()}, layout).numbers
    if layout.uniform or any(name not in adapters.modules or layer.copies > 1 for name, layer in layers.items()):
        return worst
    sizes = [shape.params_per_rank for shape in adapters.shapes()]
    dearest = max(size / cost for size, cost in zip(sizes, plan.costs, strict=True))  # numbers for a unit of the budget
    return min(worst, math.floor(plan.target * dearest + 1e-9))


def _layers_of(adapters: Adapters) -> tuple[dict[str, LayerToWrite], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The layers of the file, and the factors of each; the experts of a stack are one."""
    factors = {name: _factors(adapter) for name, adapter in adapters.modules.items()}
    bases = {name: adapter.base_layer for name, adapter in adapters.modules.items()}
    stacks, factors = stacked(bases, factors)
    layers = {}
    for name, (a, b) in factors.items():
        dtype = torch.promote_types(a.dtype, b.dtype)
        if name in stacks:
            layers[name] = LayerToWrite(
                a.shape[1], b.shape[0], a.shape[0], dtype, pack=partial(pack_stack, stacks[name].experts),
                owner=stacks[name].owner,
            )
            continue
        kind, layer = adapters.modules[name].layout, bases[name]
        layers[name] = LayerToWrite(
            a.shape[1], b.shape[0], a.shape[0], dtype, kind.keys, None if kind.plain else partial(kind.pack, layer),
            kind.groups(layer),
        )
    return layers, factors


def _states(adapters: Adapters) -> dict[str, torch.Tensor]:
    """{name in the model: tensor} of the modules that are written whole."""
    return {
        f"{head}.{key}": value
        for head in saved_whole(adapters) for key, value in _module(adapters, head).state_dict().items()
    }


def _module(adapters: Adapters, name: str) -> nn.Module:
    """A head, or another module of the model; a head keeps its name when something is put around it."""
    return adapters.heads[name] if name in adapters.heads else adapters.model.get_submodule(name)


def saved_whole(adapters: Adapters) -> list[str]:
    """Names of the modules that are written whole: the heads, and whatever shares a weight with one. PEFT gives every
    module in the file its own copy, and keeps that of any other as it was."""
    found = {*adapters.heads, *(name for head in adapters.heads for name in partners(adapters.model, head))}
    return sorted(name for name in found if not any(name.startswith(f"{outer}.") for outer in found))


def _factors(adapter: Triplets) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A (k, d_in), lora_B (d_out, k)) of the triplets that are kept or not zero."""
    keep = adapter.kept | adapter.contributes()
    lora_a = adapter.Q.detach()[keep]
    lora_b = adapter.scaled().detach()[:, keep]
    return lora_a.cpu(), lora_b.cpu()


def caveats(adapters: Adapters) -> list[str]:
    """Where PEFT would compute something else than these adapters, one sentence each."""
    found = {name: adapter.layout.caveat(adapter.base_layer) for name, adapter in adapters.modules.items()}
    return [f"{name}: {caveat}" for name, caveat in found.items() if caveat]


def _config(adapters: Adapters, written: list[str], rank: int) -> dict[str, Any]:
    model = adapters.model
    stacks = [name for name in written if name not in adapters.modules]
    others = [name for name in written if name in adapters.modules]
    parameters = as_parameters(getattr(getattr(model, "config", None), "model_type", None), others)
    modules = [name for name in others if not is_parameter(name, parameters)]
    parameters += stacks
    extra: dict[str, Any] = {KEY: parameters} if parameters else {}
    return lora_config(
        rank, _target_modules(adapters, modules), **extra, base_model_name_or_path=fingerprint.name_of(model),
        task_type=_task_type(model, bool(adapters.heads)), modules_to_save=saved_whole(adapters) or None,
        fan_in_fan_out=any(a.layout.name == "conv1d" for a in adapters),
    )


def _task_type(model: nn.Module, heads: bool) -> str | None:
    """PEFT's name of the model's task; None where PEFT's class for that task cannot call the model: it passes
    ``input_ids`` by name, which a Whisper's forward pass does not take, and it expects a head in the file."""
    class_name = type(model).__name__
    task_type = next((t for end, t in _TASK_TYPES.items() if class_name.endswith(end)), None)
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or (task_type in WITH_HEAD and not heads):
        return None
    if task_type == "SEQ_2_SEQ_LM" and not getattr(getattr(model, "config", None), "is_encoder_decoder", True):
        return "CAUSAL_LM"  # a decoder that sees images or hears speech, such as a LLaVA
    return task_type


def _target_modules(adapters: Adapters, written: list[str]) -> list[str] | str:
    """Short suffixes if they name exactly the written modules, else full names, else a pattern."""
    inside = tuple(f"{name}." for name in adapters.modules)
    plain = [name for name, _ in adapters.model.named_modules() if name and not name.startswith(inside)]
    suffixes = {name.rsplit(".", 1)[-1] for name in written}
    for names in (sorted(suffixes), sorted(written)):
        hit = {name for name in plain if any(name == n or name.endswith("." + n) for n in names)}
        if hit == set(written):
            return names
    # a full name is also the suffix of another; PEFT reads a string as a regular expression for whole names
    return "|".join(re.escape(name) for name in sorted(written))
