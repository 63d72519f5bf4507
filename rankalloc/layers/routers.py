"""Layers that decide which expert computes, and do not compute: routers, and gates with one output.

A router scores the experts for each token. Its gradient comes through a choice, and a small change of it moves tokens
from one expert to another, so low-rank updates of routers are left to those who ask for them. A gate with one output
has a weight of one row: an update of rank 1 is as large as the gate itself.
"""

from __future__ import annotations

from torch import nn

from .experts import stacked_weights

_NAMES = ("gate", "router")


def routers_in(model: nn.Module) -> dict[str, nn.Linear]:
    """{full name: layer} of the linear layers in ``model`` that route tokens, or weigh an expert by one number."""
    found: dict[str, nn.Linear] = {}
    for name, parent in model.named_modules():
        beside_experts = any(key == "experts" or stacked_weights(child) for key, child in parent.named_children())
        for key, child in parent.named_children():
            if not isinstance(child, nn.Linear):
                continue
            routes = beside_experts and key in _NAMES
            weighs = child.out_features == 1 and any(word in key for word in _NAMES)
            if routes or weighs:
                found[f"{name}.{key}" if name else key] = child
    return found


def said_of_routers(names: list[str]) -> list[str]:
    """That these layers are left out, in one sentence; nothing where there are none."""
    if not names:
        return []
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return [
        f"{names[0]}{more} {'are' if more else 'is'} left out: routers and gates with one output decide which expert "
        "computes; name them in target_modules to adapt them"
    ]
