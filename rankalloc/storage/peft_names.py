"""Names that PEFT rewrites: projections of models whose experts transformers 5 stacks.

In older versions of transformers each expert was three linear layers; now two parameters hold the weights of all. So
that old adapters still load, PEFT takes a target module called ``up_proj``, say, for the experts' stacked parameter,
wherever in the model it is, in a list as in a pattern. Shared experts and the dense blocks of the same model have
layers of that name too, and their adapters would be dropped. PEFT rewrites no ``target_parameters``, though, and a
matrix that is adapted as a parameter has the same factors under the same keys:

    target_parameters    ["model.layers.0.mlp.shared_experts.up_proj.weight", ...]
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

REWRITTEN = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
"""Names of projections and routers that PEFT 0.19 and later may rewrite."""
KEY = "target_parameters"
_WEIGHT = ".weight"


def as_parameters(model_type: str | None, names: Iterable[str]) -> list[str]:
    """The parameters as which PEFT has to be told of some of the layers ``names``, in a model of this type.

    Args:
        model_type: of the model's configuration; None for a model that is not of transformers.
    """
    if model_type is None or not _stacks_experts(model_type):
        return []
    return [name + _WEIGHT for name in names if name.rsplit(".", 1)[-1] in REWRITTEN]


def kept_as_parameters(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The parameters as which an adapter's configuration speaks of some of the layers ``names``."""
    given = config.get(KEY) or ()
    return [name + _WEIGHT for name in names if is_parameter(name, given)]


def stacks_in(config: Mapping[str, Any]) -> list[str]:
    """The stacked parameters of experts that an adapter's configuration names. A layer's own weight is none: it is a
    matrix, whose factors are those of the layer."""
    return [str(name) for name in config.get(KEY) or () if not str(name).endswith(_WEIGHT)]


def plain_name(name: str) -> str:
    """The name of a module in the model, from one in PEFT's file, where wrappers may be nested."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def is_parameter(name: str, parameters: Collection[str]) -> bool:
    """Whether the layer ``name`` is among target parameters, whole names or ends of names, as PEFT reads them."""
    weight = name + _WEIGHT
    return weight in parameters or any(weight.endswith(f".{parameter}") for parameter in parameters)


def pattern_of(modules: Iterable[str], parameters: Collection[str]) -> list[str] | str:
    """The ``target_modules`` of exactly these modules of a model that is not at hand.

    A pattern of whole names, since a list is read as ends of names and what else ends so is not known. Where PEFT
    rewrites names it reads a pattern by the last part of what it matches, so there it is the list.
    """
    names = sorted(modules)
    return names if parameters or not names else "|".join(re.escape(name) for name in names)


def _stacks_experts(model_type: str) -> bool:
    conversions = get_checkpoint_conversion_mapping(model_type) or []
    return any(".experts." in f".{target}." for each in conversions for target in each.target_patterns)
