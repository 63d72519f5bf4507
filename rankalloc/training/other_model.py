"""A callback whose adapters are not in the Trainer's model: it serves a second Trainer, or one with ``model_init``.

Such a Trainer makes its model again when training begins. A callback that adopts takes the new one over, unless a
checkpoint has been loaded into it by then; any other would go on driving layers that nobody trains.
"""

from __future__ import annotations

from torch import nn

from ..adapters.adapter_set import Adapters
from ..adapters.driven import DrivenLayer
from ..errors import NotAdaptedError


def is_inside(adapters: Adapters, model: nn.Module) -> bool:
    """Whether the layers of ``adapters`` are in ``model``, whatever wraps either."""
    modules = {id(module) for module in model.modules()}
    return any(id(a.layer if isinstance(a, DrivenLayer) else a) in modules for a in adapters)


def require_adoptable(adopts: bool, step: int) -> None:
    """Make sure that another model's layers can be taken over now.

    Args:
        adopts: whether the callback was made without adapters.
        step: that the run goes on from.

    Raises:
        NotAdaptedError: the adapters were given, or a checkpoint was loaded before anything knew of its ranks.
    """
    if not adopts:
        raise NotAdaptedError(
            "the adapters of this RankCallback are not in the Trainer's model, which is another one or was made anew "
            "by model_init: make a RankCallback for each Trainer, with the adapters of its model=, or leave adapters "
            "out, so that it adopts the LoRA layers it finds"
        )
    if step > 0:
        raise NotAdaptedError(
            "the Trainer made its model anew by model_init and loaded a checkpoint into it, before the RankCallback "
            "could take over its layers: resume with Trainer(model=...) instead of model_init"
        )
