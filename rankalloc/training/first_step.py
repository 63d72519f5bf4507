"""Checks that need a backward pass or an optimizer, made once at a run's first step."""

from __future__ import annotations

import torch

from ..adapters import optimizer_state
from ..adapters.adapter_set import Adapters
from ..adapters.memory import require_trained
from ..adapters.optimizer_state import Verb
from ..errors import NotAdaptedError
from . import averages, sharding
from .run_state import RunState
from .wrappers import refuse_data_parallel


def require_whole_gradients(adapters: Adapters) -> None:
    """Make sure, after the first backward pass, that gradients come from where they should.

    Raises:
        RankallocError: nobody averages the gradients of a sharded base's adapters, adapters are sharded themselves, or
            nn.DataParallel spreads the model over several devices.
    """
    sharding.check(adapters)
    refuse_data_parallel(adapters.model)


def require_usable(optimizer: torch.optim.Optimizer | None, state: RunState) -> None:
    """Make sure at the first step that ``optimizer`` trains the adapters and can follow what the method does to them.

    Raises:
        NotAdaptedError: no optimizer is given though one is needed, or it does not hold the adapters.
        RankallocError: its state cannot follow; an average of the weights does not.
    """
    settings = state.settings
    if optimizer is not None:
        require_trained(state.adapters, optimizer)
        needed: dict[Verb, bool] = {
            "select": bool(settings.shrink), "turn": settings.canonical, "forget": state.rule.pins_dropped,
        }
        optimizer_state.require_support(state.adapters, optimizer, [v for v in needed if needed[v]])
    elif settings.shrink:
        raise NotAdaptedError(
            "removing dropped ranks needs the optimizer: call controller.update(optimizer), or make the "
            "controller with shrink=False"
        )
    elif settings.canonical:
        raise NotAdaptedError(
            "changing the basis needs the optimizer: call controller.update(optimizer), or use canonical=False"
        )
    if not state.frozen:
        averages.require_followed(state.adapters, state.averages)
