"""What a run is settled to do: method, budget and options, checked against the adapters before anything begins.

:func:`settle` is pure: it changes neither adapters nor files, draws nothing and allocates nothing, so a caller can ask
whether a run would be refused without beginning one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..adapters.adapter_set import Adapters
from ..adapters.triplets import Triplets
from ..budget import BudgetPlan, RankBudget
from ..errors import ConfigError, unknown
from ..layers.experts import ExpertMatrix
from ..methods import PLACEMENTS, Method, find_method
from ..methods.allocators import ALLOCATORS, Demand, Kept, Scores
from ..methods.requirements import basis_of, require_trainable
from ..methods.rules import RULES, Rule
from ..methods.scores import SCORES, Score
from ..methods.scores.routing import Routed
from ..options import flag
from .checks import budget_after, budget_of_units, check_spendable

Shrink = Literal["events", "freeze", False]
"""When dropped triplets leave memory; see :class:`rankalloc.RankController`."""


@dataclass(frozen=True)
class Settings:
    """One run's method, budget and options.

    Attributes:
        method: how ranks are chosen.
        budget: as the controller spends it; restated where ranks were chosen before training.
        schedule: the budget resolved for these layers and this number of steps.
        placement: a key of ``rankalloc.methods.PLACEMENTS``.
        shrink: when dropped triplets leave memory.
        seed: of what the method draws.
        canonical: whether adapters are brought to canonical form at each allocation.
        orthogonal: weight of the orthogonality regulariser, 0 for none.
        score_after_step: whether scores look after the optimizer's step, as PEFT's do.
        routing: whether scores of experts are weighed by their share of the tokens.
        recorded: the options as a trace keeps them.
    """

    method: Method
    budget: RankBudget
    schedule: BudgetPlan
    placement: str
    shrink: Shrink
    seed: int
    canonical: bool
    orthogonal: float
    score_after_step: bool
    routing: bool
    recorded: dict[str, Any]
    _rule_options: dict[str, Any] = field(repr=False)
    _score_options: dict[str, Any] = field(repr=False)

    @property
    def allocator(self) -> Callable[[Scores, Demand], Kept]:
        """Turns scores and a demand into masks: the method's own, or that of another placement."""
        return ALLOCATORS[self.method.allocator if self.placement == "chosen" else self.placement]

    def new_rule(self, adapters: Sequence[Triplets]) -> Rule:
        """The method's rule over ``adapters``."""
        return RULES[self.method.rule](adapters, self.schedule, self.seed, **self._rule_options)

    def new_score(self, adapters: Sequence[Triplets]) -> Score | None:
        """The method's score over ``adapters``, with empty state; None for a method without one."""
        if self.method.score is None:
            return None
        score = SCORES[self.method.score](adapters, **self._score_options)
        return Routed(adapters, score) if self.routing else score


def settle(
    adapters: Adapters,
    budget: RankBudget,
    total_steps: int,
    method: str = "auto",
    *,
    shrink: bool | str = True,
    seed: int | None = None,
    options: Mapping[str, Any],
) -> Settings:
    """Check that ``method`` can choose these adapters' ranks under ``budget``, and settle what arguments leave open.

    Args: as for :class:`rankalloc.RankController`; ``options`` are the method's own.

    Raises:
        BudgetError: the budget does not fit the adapters.
        ConfigError: unknown method or option, or a value out of its range.
        NotAdaptedError: the method chooses ranks before training, and that was not done.
    """
    chosen, options = find_method(method), dict(options)
    _require_parts(chosen)
    strangers = [name for name in options if name not in chosen.options]
    if strangers:
        raise ConfigError(unknown(f"option of method {method!r}:", strangers[0], chosen.options or ["none"]))
    require_trainable(chosen, adapters.init)
    if RULES[chosen.rule].changes_forward and not all(adapter.own_forward for adapter in adapters):
        raise ConfigError(
            f"method {method!r} changes what an adapter computes at every step, and these are PEFT's own layers; use "
            "rankalloc.attach on the plain model, or another method"
        )
    canonical, orthogonal = basis_of(chosen, adapters.init, options)
    score_after_step = flag("score_after_step", options.pop("score_after_step", False))
    routing = flag("routing", options.pop("routing", False))
    if routing and not any(isinstance(adapter.base_layer, ExpertMatrix) for adapter in adapters):
        raise ConfigError(
            "routing=True weighs experts by their share of the tokens, and no experts stacked in one tensor are "
            "adapted here; leave it out"
        )
    placement = options.pop("placement", "chosen")
    if placement not in PLACEMENTS:
        raise ConfigError(unknown("placement", placement, PLACEMENTS))
    if not chosen.lora:
        options.pop("after", None)
        budget = budget_of_units(adapters, budget)
    elif chosen.planner is not None:
        budget = budget_after(adapters, budget, chosen)
    # of the ranks at the start: weights loaded from a checkpoint may have been shrunk already
    shapes = [replace(s, rank=a.initial_rank) for s, a in zip(adapters.shapes(), adapters, strict=True)]
    schedule = budget.resolve(shapes, total_steps, adapters.bytes_per_param())
    check_spendable(schedule, adapters)
    of_rule = set(options) & set(inspect.signature(RULES[chosen.rule]).parameters)
    when = _when_to_shrink(shrink, chosen, placement)
    effective: dict[str, Any] = {
        "canonical": canonical, "orthogonal": orthogonal, "placement": placement, "shrink": when,
        **({"score_after_step": True} if score_after_step else {}), **({"routing": True} if routing else {}),
    }
    settings = Settings(
        chosen, budget, schedule, placement, when, seed or 0, canonical, orthogonal, score_after_step, routing,
        recorded=options | (effective if chosen.options else {}),
        _rule_options={name: value for name, value in options.items() if name in of_rule},
        _score_options={name: value for name, value in options.items() if name not in of_rule},
    )
    # over no adapters: rule and score check their own options, and allocate nothing
    settings.new_rule([])
    settings.new_score([])
    return settings


def _require_parts(method: Method) -> None:
    """Raise ConfigError when the method, which may come from outside, names a part that nobody registered."""
    parts: tuple[tuple[str, str | None, Mapping[str, Any]], ...] = (
        ("score", method.score, SCORES), ("rule", method.rule, RULES), ("allocator", method.allocator, ALLOCATORS),
    )
    for what, name, registry in parts:
        if name is not None and name not in registry:
            raise ConfigError(f"method {method.name!r} names an {unknown(what, name, registry)}")


def _when_to_shrink(shrink: bool | str, method: Method, placement: str) -> Shrink:
    needs_room = method.rule != "shrink" or placement == "shuffled"  # dropped ranks may come back until the freeze
    when = ("freeze" if needs_room else method.shrinks) if shrink is True else shrink
    if when not in ("events", "freeze", False):
        raise ConfigError(f'shrink takes True, False, "events" or "freeze", got {shrink!r}')
    if when == "events" and needs_room:
        raise ConfigError(
            f"method {method.name!r}, placement {placement!r}, needs the room of dropped ranks until the freeze; "
            'use shrink="freeze"'
        )
    return when
