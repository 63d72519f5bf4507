"""Weights that a model's checkpoint did not have: drawn at random when it was loaded, and in no file unless saved.

transformers marks every parameter that it found in the checkpoint, or that is tied to one. A parameter without the mark
in a model that has others with it was drawn: a new task head, but also the pooler that BERT's classifier reads and many
checkpoints lack, or the projector of a speech classifier. A model built from a configuration has no marks, nor has a
deep copy, so nothing is known of them.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_MARK = "_is_hf_initialized"


def missing_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{full name: parameter} of what the checkpoints of ``model``, and of transformers models in it, lacked."""
    found: dict[str, nn.Parameter] = {}
    for prefix, part in _loaded(model):
        parameters = dict(part.named_parameters(prefix=prefix))
        marked = {name for name, parameter in parameters.items() if getattr(parameter, _MARK, False)}
        if marked:
            found |= {name: parameter for name, parameter in parameters.items() if name not in marked}
    return found


def missing_modules(model: nn.Module) -> list[str]:
    """The full names of the modules whose own parameters the checkpoint lacked, in the model's order.

    A module that has parameters of its own from the checkpoint, or parts with some, is left out: it cannot be saved
    whole as what is new in it.
    """
    missing = missing_parameters(model)
    owners = {name.rpartition(".")[0] for name in missing}
    modules = dict(model.named_modules())
    return [
        name for name in modules
        if name in owners and all(f"{name}.{part}" in missing for part, _ in modules[name].named_parameters())
    ]


def left_frozen(model: nn.Module, saved: list[str]) -> list[str]:
    """One sentence when weights that the checkpoint lacked are in none of the modules ``saved``; else nothing."""
    left = [name for name in missing_parameters(model) if not any(name.startswith(f"{head}.") for head in saved)]
    if not left:
        return []
    more = f" and {len(left) - 1} more" if left[1:] else ""
    return [
        f"{left[0]}{more} {'were' if more else 'was'} not in the model's checkpoint: drawn at random, frozen, and in "
        "no file that is saved; name the module in modules_to_save to train and save it"
    ]


def _loaded(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the outermost transformers models in ``model``."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append((name, module))
    return found
