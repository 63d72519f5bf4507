"""What training changes in an adapted model, exactly as it is, without the base: the weights of a checkpoint.

Plain LoRA is not enough to go on from. It holds P·(Λ·s) in one matrix and leaves out what is dropped and may come back.
Here is everything that training changes, under its name in ``model.state_dict()``:

- each adapter's factors and masks, and the gates of a mixture of adapters;
- the task heads, and any other parameter that is trained;
- running statistics of normalisation layers;
- under :data:`FAMILIES`, which adapters share the products of one input. Sums are rounded in another order without.

transformers' Trainer resumes from ``model.safetensors`` (and looks for the best model there, beside an adapter), with
``model.load_state_dict(..., strict=False)``. So that is the file's name; its metadata says what it is, and
``adapter_config.json`` beside it makes every other reader load the base first. torch then reports every weight of the
base as missing. :func:`prepare_to_load` lets a model take such a file for complete: the report is emptied when nothing
but the whole base is missing, and stays in every other case.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..adapters.adapter import Adapter
from ..adapters.gates import Gate
from ..adapters.mixed import Gated
from ..errors import RankallocError
from ..layers import families
from .tensors import read_header, read_tensors, write_tensors

STATE_NAME = "model.safetensors"
FAMILIES = "rankalloc.families"
ABOUT = {"format": "pt", "rankalloc": "what training changed; the base's weights are not in this file"}
"""Metadata of the file."""


def trained_state(model: nn.Module, heads: Iterable[nn.Module] = ()) -> dict[str, torch.Tensor]:
    """{name in ``model.state_dict()``: tensor} of what training changes; tied weights under all their names."""
    changed = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for module in model.modules():
        if isinstance(module, (Adapter, _NormBase)):
            changed |= {id(tensor) for tensor in module.buffers(recurse=False)}
        if isinstance(module, (Adapter, Gated, Gate)):
            changed |= {id(tensor) for tensor in module.parameters(recurse=False)}
    for head in heads:  # frozen parts of a head are not the base's either
        changed |= {id(tensor) for tensor in (*head.parameters(), *head.buffers())}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in changed}


def write_trained_state(model: nn.Module, heads: Iterable[nn.Module], folder: Path, prefix: str = "") -> None:
    """Write :func:`trained_state` into ``folder``.

    Args:
        prefix: of the names in the state of what wraps the model, as "_orig_mod.".

    Raises:
        RankallocError: the file cannot be written; the old one then stays.
    """
    state = {prefix + name: tensor.detach() for name, tensor in trained_state(model, heads).items()}
    write_tensors(folder / STATE_NAME, state | _families_of(model, prefix), ABOUT)


def leave_base_out(outer: nn.Module, model: nn.Module, heads: Iterable[nn.Module], folder: Path) -> None:
    """Write a file of all of ``outer``'s weights again without the base of ``model``, an adapted module in it.

    The Trainer writes such a file of a model that has no ``save_pretrained``. Beside a configuration it is a whole
    transformers model, around an adapted part of it, and stays. So does that of a module around a PeftModel: layers of
    PEFT's have nothing that lets the model take a file without its base, so such a Trainer's checkpoints are whole.
    """
    file = folder / STATE_NAME
    prefix = next((f"{name}." if name else "" for name, module in outer.named_modules() if module is model), None)
    whole = (folder / "config.json").exists()
    if prefix is None or whole or not adapters_in(model) or not file.is_file() or is_trained_state(file):
        return
    changed = trained_state(model, heads)
    base = {prefix + name for name in model.state_dict() if name not in changed}
    tensors, _ = read_tensors(file)
    left = {name: tensor for name, tensor in tensors.items() if name not in base}
    write_tensors(file, left | _families_of(model, prefix), ABOUT)


def _families_of(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    text = json.dumps(families.known(adapters_in(model)))
    return {prefix + FAMILIES: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def is_trained_state(path: Path) -> bool:
    """Whether the file is one of :func:`write_trained_state`. Raises AdapterFileError when it is damaged."""
    return "rankalloc" in read_header(path).metadata


def adapters_in(model: nn.Module) -> dict[str, Adapter]:
    """{module name: Adapter} of ``model``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def prepare_to_load(model: nn.Module) -> Callable[[], None]:
    """Let ``model.load_state_dict`` take a trained state for complete; returns what undoes that."""
    handles = (
        model.register_load_state_dict_pre_hook(_take_families),
        model.register_load_state_dict_post_hook(_expect_no_base),
    )

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


# hooks find their layers in the module that they are given, so that copies of the model have them too


def _take_families(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the families out of ``state`` before torch looks for a module of that name."""
    saved = state.pop(prefix + FAMILIES, None)
    if saved is None:
        return
    adapters = adapters_in(model)
    try:
        known = json.loads(bytes(saved.tolist()))
    except ValueError as error:
        raise RankallocError(f"the checkpoint is damaged ({FAMILIES}: {error}); use an earlier one") from None
    families.remember(adapters, [names for names in known if all(name in adapters for name in names)])


def _expect_no_base(model: nn.Module, incompatible: Any) -> None:
    """Empty the list of missing names when they are the whole base and nothing else of ``model``."""
    if not incompatible.missing_keys or not any(isinstance(m, (Adapter, Gated)) for m in model.modules()):
        return
    changed = trained_state(model).keys()
    base = {name for name, _ in model.named_parameters(remove_duplicate=False)} - changed
    prefix = _prefix_of(base, incompatible.missing_keys)
    if prefix is None:
        return
    own = {name[len(prefix) :] for name in incompatible.missing_keys if name.startswith(prefix)}
    if base <= own and not own & changed:
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.startswith(prefix)]


def _prefix_of(names: Iterable[str], missing: Iterable[str]) -> str | None:
    """What wrappers put before the model's own names in ``missing``; None when none of ``names`` is missing."""
    one = next(iter(names), None)
    found = [name for name in missing if one is not None and (name == one or name.endswith(f".{one}"))]
    return found[0].removesuffix(one) if found and one is not None else None


def same_values(state: Mapping[str, torch.Tensor], given: Mapping[str, Any], prefix: str) -> bool:
    """Whether a state dict that was passed along holds what the model holds, as far as it names it."""
    pairs = [(tensor, given.get(prefix + name)) for name, tensor in state.items()]
    return all(
        theirs is None or (theirs.shape == own.shape and torch.equal(theirs.detach().cpu(), own.detach().cpu()))
        for own, theirs in pairs
    )
