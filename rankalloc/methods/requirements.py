"""The adapters that a method can train, and the basis that a run trains them in."""

from __future__ import annotations

from typing import Any

from ..adapters.starts import OWN_START
from ..adapters.triplets import BOTTLENECK, FIXED_Q
from ..errors import ConfigError
from ..options import flag, number
from . import METHODS, Method
from .planners import PLANNERS, Planner
from .scores import SCORES


def require_trainable(method: Method, init: str) -> None:
    """Raise ConfigError when ``method`` cannot train adapters of this parametrisation; the message says how to attach.

    Args:
        init: a key of ``rankalloc.adapters.triplets.TRAINED``.
    """
    if (init == BOTTLENECK) == method.lora:
        raise ConfigError(
            f"method {method.name!r} trains {'low-rank updates' if method.lora else 'bottlenecks'}, and these adapters "
            f"were attached with init={init!r}; attach with init={method.init!r}, or with the method's own plan"
        )
    if init in OWN_START and method.planner and PLANNERS[method.planner].initial is not Planner.initial:
        raise ConfigError(
            f"method {method.name!r} starts adapters from factors it computes, and init={init!r} from "
            f"{OWN_START[init]}; choose ranks by another method, or attach with another init"
        )
    if init == "lora-xs" and method.when == "during":
        raise ConfigError(
            f"method {method.name!r} chooses ranks while it trains, and every entry of the core that init='lora-xs' "
            "trains joins two of them, so none can be scored alone; use 'uniform', or another method that chooses "
            "before training"
        )
    if init in FIXED_Q:
        if _fits_any_basis(method):
            return
        others = ", ".join(m.name for m in METHODS.values() if m.when == "during" and _fits_any_basis(m))
        raise ConfigError(
            f"method {method.name!r} trains or rotates both P and Q, which init={init!r} leaves as they were drawn; "
            f"use one of {others}, or a method that chooses before training"
        )
    if init == method.init or method.rule == "shrink" and (init == "gate" or not method.score):
        return
    if init == "lora" and method.init == "svd":
        return  # its factors hold the size of each triplet, which λ would
    if init == "lora":
        raise ConfigError(
            f"method {method.name!r} needs adapters with a trained Λ between their factors, which plain LoRA (PEFT's "
            f"layers, and init='lora') does not have; use rankalloc.attach with init={method.init!r}, or another method"
        )
    raise ConfigError(
        f"method {method.name!r} trains adapters of init={method.init!r}; these were attached with init={init!r}"
    )


def basis_of(method: Method, init: str, options: dict[str, Any]) -> tuple[bool, float]:
    """(canonical, orthogonal) of a run: the options of these names, removed from ``options``, or the method's own.

    Raises:
        ConfigError: one is out of its range, or rotates a basis that is not trained.
    """
    fixed, plain = init in FIXED_Q, init == "lora"
    canonical = flag("canonical", options.pop("canonical", method.canonical and not fixed))
    default = 0.0 if canonical or fixed or plain else method.orthogonal
    orthogonal = number("orthogonal", options.pop("orthogonal", default))
    if plain and orthogonal:
        raise ConfigError(
            f"orthogonal={orthogonal:g} pulls P and Q to length 1, and in plain LoRA (init='lora') they hold the size "
            "of ΔW; leave it out"
        )
    if fixed and (canonical or orthogonal):
        which = "canonical=True" if canonical else f"orthogonal={orthogonal:g}"
        raise ConfigError(f"{which} changes both P and Q, and init={init!r} trains at most one of them; leave it out")
    return canonical, orthogonal


def _fits_any_basis(method: Method) -> bool:
    """Whether neither the rule nor the score of ``method`` needs P and Q to be trained."""
    return method.rule == "shrink" and (not method.score or SCORES[method.score].any_basis)
