"""Layers that an adapter would not reach, although they are of a kind that can be adapted.

- Their weight is read and they are never called: an adapter beside them computes nothing. torch's own modules do this
  (nn.TransformerEncoderLayer), and modules of models, such as WavLM's attention and Mamba's ``dt_proj``. Those are
  found in the source of the module's methods: it reads ``self.name.weight`` and nowhere calls ``self.name(...)``. A few
  read it on the way that training takes and call it on others; those are known by name.
- The model changes their weight in evaluation, as an RWKV halves it every few blocks, and would not change an adapter.
- PEFT refuses them, so that no file with an adapter of theirs could be loaded there.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

_READ = "{owner} reads this weight directly and would never call an adapter"
_ENCODER = "nn.TransformerEncoderLayer reads this weight directly outside of training and would never call an adapter"
_RESCALED = "RwkvModel divides this weight in evaluation (rescale_every) and would not divide an adapter"
_REFUSED = "PEFT refuses adapters of this layer in a model of type {model_type}, so no file could be loaded there"

_READ_IN_TRAINING = {
    "FalconMambaMixer": ("dt_proj",), "JambaMambaMixer": ("dt_proj",), "Gemma3nTextAltUp": ("correction_coefs",),
}
_WEIGHT = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|ndim|data|requires_grad))")
_REFUSED_BY_PEFT = ("out_proj", "conv1d")
_REFUSED_IN = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def out_of_reach(model: nn.Module) -> dict[int, str]:
    """{id of module: why not} of the layers in ``model`` that an adapter would not reach."""
    found: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            found |= dict.fromkeys((id(module.linear1), id(module.linear2)), _ENCODER)
        owner: Any = type(module)
        reason = _READ.format(owner=owner.__name__)
        found |= {id(part): reason for name, part in module.named_children() if name in _read_in(owner)}
        if owner.__name__ == "RwkvModel":
            found |= _rescaled(module)
    return found | _refused(model)


@cache
def _read_in(owner: type) -> frozenset[str]:
    """Attributes whose weight the methods of a class read and which they never call; none where there is no source."""
    methods = [method for cls in owner.__mro__ for method in _methods_of(cls)]
    sources = [_source_of(method) for method in methods if "weight" in method.__code__.co_names]
    read = {name for source in sources for name in _WEIGHT.findall(source)}
    if read:
        whole = "\n".join(_source_of(method) for method in methods)
        read = {name for name in read if not re.search(rf"\bself\.{name}\(", whole)}
    return frozenset(read).union(_READ_IN_TRAINING.get(owner.__name__, ()))



def _methods_of(cls: type) -> list[FunctionType]:
    """Functions that a class of a model defines; what all models share is left out, since it knows no layer's name."""
    if cls.__module__.partition(".")[0] in ("torch", "builtins") or cls.__module__ == "transformers.modeling_utils":
        return []
    return [inspect.unwrap(member) for member in vars(cls).values() if inspect.isfunction(member)]


@cache
def _source_of(method: FunctionType) -> str:
    try:
        return inspect.getsource(method)
    except (OSError, TypeError):
        return ""


def _rescaled(model: nn.Module) -> dict[int, str]:
    every, blocks = getattr(model.config, "rescale_every", 0), getattr(model, "blocks", ())
    if not 0 < every < len(blocks):
        return {}
    return {
        id(layer): _RESCALED for block in list(blocks)[every:]
        for layer in (block.attention.output, block.feed_forward.value)
    }


def _refused(model: nn.Module) -> dict[int, str]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _REFUSED_IN:
        return {}
    reason = _REFUSED.format(model_type=model_type)
    return {
        id(module): reason for name, module in model.named_modules() if name.rpartition(".")[2] in _REFUSED_BY_PEFT
    }
