"""Adapters of stacked experts read from PEFT's format, for a model that tells how many experts a stack has."""

from __future__ import annotations

from torch import nn

from ..errors import AdapterFileError
from ..layers.experts import ExpertMatrix, stacked_weights
from ..lowrank import Factors
from .experts import keyed_as, unpack_stack
from .peft_names import plain_name, stacks_in
from .reading import FinishedAdapter
from .triplets import triplet_sizes


def experts_in(model: nn.Module) -> list[str]:
    """Full names of the modules that hold stacked experts."""
    return [name for name, module in model.named_modules() if stacked_weights(module)]


def read_stacks(finished: FinishedAdapter, model: nn.Module) -> dict[str, Factors]:
    """The factors of every expert in the file, by the names of their matrices in ``model``; without zero padding.

    Raises:
        AdapterFileError: they do not fit the model, or a weight is not finite.
    """
    named = stacks_in(finished.config)
    found: dict[str, Factors] = {}
    modules = dict(model.named_modules())
    owners = list(dict.fromkeys(plain_name(path) for path in finished.stacks))
    for owner in owners:
        adapted = [
            key for key in stacked_weights(modules[owner])
            if any(f".{owner}.{key}".endswith(f".{name}") for name in named)
        ]
        places = keyed_as({f"{owner}.{key}": owner for key in adapted})
        for key in adapted:
            stack = f"{owner}.{key}"
            if places[stack] in finished.stacks:
                found |= _of_stack(finished, stack, places[stack], ExpertMatrix(modules[owner], key, 0))
    return found


def _of_stack(finished: FinishedAdapter, stack: str, path: str, first: ExpertMatrix) -> dict[str, Factors]:
    experts = len(first.stack)
    lora_a, lora_b = (finished.tensor(finished.stacks[path][part]) for part in "AB")
    rank, over = divmod(len(lora_a), experts)
    shape = (rank * experts, first.in_features), (first.out_features, rank * experts)
    if over or (tuple(lora_a.shape), tuple(lora_b.shape)) != shape:
        raise AdapterFileError(
            f"{finished.folder} was made for another model: the factors of {stack} are {tuple(lora_a.shape)} and "
            f"{tuple(lora_b.shape)}, and its {experts} experts here are {first.in_features} → {first.out_features}"
        )
    scaling, what = finished.scaling_of(stack, rank), f"{finished.folder}: the weights of {stack}"
    found = {}
    for expert, (a, b) in enumerate(unpack_stack(experts, lora_a, lora_b)):
        of_a, of_b = triplet_sizes(a, b, None, what)
        used = (of_a != 0) | (of_b != 0)
        found[f"{stack}.{expert}"] = Factors(b[:, used], a[used], None, scaling)
    return found
