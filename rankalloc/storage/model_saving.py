"""``model.save_pretrained`` while adapters are attached: an adapter is written, not the base under strange names.

A transformers model, and transformers' Trainer with it, saves every parameter under its name in the module tree. With
adapters inside, that is the whole base as ``q_proj.base_layer.weight`` beside ``q_proj.P``, which ``from_pretrained``
takes for a model without a q_proj. So :func:`attach` gives each such model a ``save_pretrained`` of its own:

    any folder          what :func:`rankalloc.save` writes: plain LoRA, which PEFT and transformers load
    checkpoint-N        that, and :mod:`.trained_state`, which the Trainer resumes from

``detach`` and ``merge`` give the class's own method back. A copy of the model saves its own adapters.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters import attaching
from ..adapters.adapter_set import Adapters
from ..errors import ConfigError
from .saving import save
from .tensors import read_header
from .trained_state import adapters_in, prepare_to_load, same_values, trained_state, write_trained_state

CHECKPOINT = re.compile(r"checkpoint-\d+")
"""How transformers' Trainer calls its checkpoints' folders."""
_WHOLE_MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json", "model-*.safetensors")
_METHOD = "save_pretrained"


@functools.wraps(attaching.attach)
def attach(model: nn.Module, *args: Any, **kwargs: Any) -> Adapters:
    adapters = attaching.attach(model, *args, **kwargs)
    model = adapters.model  # without what is around it
    adapters.on_detach.append(prepare_to_load(model))
    for prefix, module in _saved_as_a_whole(model):
        method: Any = AdapterSaver(module, adapters, prefix)
        module.save_pretrained = method
        adapters.on_detach.append(functools.partial(vars(module).pop, _METHOD, None))
    return adapters


def _saved_as_a_whole(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name with a dot at its end, module) of what holds adapters and has a method that saves all its parameters."""
    for name, module in model.named_modules():
        # a SentenceTransformer asks each of its parts to save itself
        in_parts = type(module).__module__.split(".")[0] == "sentence_transformers"
        if callable(getattr(type(module), _METHOD, None)) and not in_parts and adapters_in(module):
            yield name + "." if name else "", module


class AdapterSaver:
    """The ``save_pretrained`` of one adapted model. Its adapters are those that the model then has.

    Args:
        model: whose method it is.
        adapters: what the adapters were attached as: heads, scale, who chooses their ranks.
        prefix: of the model's own names in those of ``adapters``.
    """

    __name__ = _METHOD

    def __init__(self, model: nn.Module, adapters: Adapters, prefix: str = "") -> None:
        self.model, self.adapters, self.prefix = model, adapters, prefix
        self.heads = [name.removeprefix(prefix) for name in adapters.heads if name.startswith(prefix)]

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model comes without the run that trains this one
        alone = replace(
            self.adapters, model=self.model, modules={}, heads={}, adaptation=None, plan=None, on_detach=[]
        )
        return {**self.__dict__, "adapters": alone}

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **others: Any,
    ) -> None:
        """Write the adapters into the folder ``save_directory``, as :func:`rankalloc.save` does.

        Args:
            is_main_process: False writes nothing.
            state_dict: of the model or of what wraps it; the weights written are the model's own.
            others: arguments of the class's own method; those about shards and formats mean nothing to an adapter.

        Raises:
            ConfigError: an argument asks for something else than a folder with this model's adapters, or the folder
                holds a model.
            NotAdaptedError: a method was to choose ranks and never did.
            RankallocError: the folder cannot be written.
        """
        modules = adapters_in(self.model)
        if not modules:
            kept = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub}
            return type(self.model).save_pretrained(self.model, save_directory, **kept, **others)  # type: ignore
        heads = {name: self.model.get_submodule(name) for name in self.heads}
        adapters = replace(self.adapters, model=self.model, modules=dict(modules), heads=heads)
        prefix = _wrapped_as(adapters, state_dict or {})
        _require_plain_folder(push_to_hub, others)
        if not same_values(trained_state(self.model, heads.values()), state_dict or {}, prefix):
            raise ConfigError(
                "save_pretrained got a state_dict= with other weights than the model has; put them into the model "
                "first (model.load_state_dict(...)), then save"
            )
        if not is_main_process:
            return None
        folder = Path(save_directory)
        if CHECKPOINT.fullmatch(folder.name):
            _make_room(folder)
            save(adapters, folder)
            write_trained_state(self.model, heads.values(), folder, prefix)
        else:
            save(adapters, folder)
        return None


def _wrapped_as(adapters: Adapters, state: dict[str, Any]) -> str:
    """What wrappers, such as torch.compile, put before the model's names in ``state``; "" without a wrapper."""
    own = f"{next(iter(adapters.modules))}.lam"
    found = [name for name in state if name == own or name.endswith(f".{own}")]
    return found[0].removesuffix(own) if found else ""


def _require_plain_folder(push_to_hub: bool, others: dict[str, Any]) -> None:
    if push_to_hub:
        raise ConfigError(
            "save_pretrained(push_to_hub=True) is not possible while adapters are attached; call "
            "model.push_to_hub(repo_id), which uploads the adapter"
        )
    for name, usual in (("variant", None), ("safe_serialization", True)):
        if others.get(name, usual) != usual:
            raise ConfigError(
                f"save_pretrained({name}={others[name]!r}) is not possible while adapters are attached: an adapter is "
                "adapter_config.json and adapter_model.safetensors; leave it out"
            )


def _make_room(folder: Path) -> None:
    """Remove the whole model that 0.1 wrote into this checkpoint: transformers would load it. Any other stays."""
    files = [*folder.glob("model.safetensors"), *folder.glob("model-*.safetensors")]
    if not any(".base_layer." in name for file in files for name in read_header(file).shapes):
        return
    for pattern in _WHOLE_MODEL:
        for file in folder.glob(pattern):
            file.unlink()
