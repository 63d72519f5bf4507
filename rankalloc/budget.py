"""The rank budget, and its course over the steps of a run. Pure: no torch.

The user gives a :class:`RankBudget`. :meth:`RankBudget.resolve` checks it against the layers it is for and returns a
:class:`BudgetPlan` in whole units with exact steps, or raises one clear error. Costs count the plain LoRA that ships:
d_in + d_out parameters for each rank of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .errors import BudgetError
from .layer_names import places
from .options import choice, integer, number

SHAPES = {"cubic": 3, "linear": 1, "constant": 0}
"""Course of the budget between warm-up and freeze: the exponent of (1 - progress)."""

Unit = Literal["ranks", "params", "bytes"]
_QUANTITIES = ("ranks", "params", "bytes", "fraction")


@dataclass(frozen=True)
class LayerShape:
    """One adapted layer: ``d_in`` and ``d_out`` of its weight, the rank it starts with, and ``extra`` parameters beside
    those of its ranks: the biases of a bottleneck."""

    name: str
    d_in: int
    d_out: int
    rank: int
    extra: int = 0

    @property
    def params_per_rank(self) -> int:
        return self.d_in + self.d_out


@dataclass(frozen=True)
class RankBudget:
    """The rank budget of a run, over all adapted layers together.

    Exactly one of the first four is given.

    Args:
        ranks: total number of ranks (singular triplets) left at the end.
        params: parameters of the exported plain LoRA, d_in + d_out for each rank.
        bytes: the same in bytes, at the adapters' own element size.
        fraction: share of the parameters that the adapters begin with, in (0, 1]; rounded down to whole parameters.
        min_rank: no layer falls below this rank.
        max_rank: no layer keeps more than this; None for the initial rank.
        multiple_of: every layer's rank is a multiple of this.
        warmup: fraction of the run before the first pruning.
        freeze: fraction of the run, at its end, in which ranks no longer change.
        every: optimizer steps between two allocations.
        shape: "cubic" (AdaLoRA, arXiv 2303.10512, eq. 12), "linear", or "constant" (the whole cut
            at the first allocation).

    Raises:
        BudgetError: none or several of the four are given, or a value is out of its range.

    Example:
        >>> import rankalloc as ra
        >>> budget = ra.RankBudget(ranks=24, warmup=0.1, freeze=0.3, every=5)
        >>> layers = [ra.LayerShape("up", 64, 256, rank=12), ra.LayerShape("down", 256, 64, rank=12),
        ...           ra.LayerShape("out", 64, 64, rank=12)]
        >>> plan = budget.resolve(layers, total_steps=100)
        >>> plan.initial, plan.target, plan.warmup_steps, plan.freeze_step
        (36, 24, 10, 70)
        >>> [plan.asked(step) for step in (10, 40, 70)]
        [36, 25, 24]
    """

    ranks: int | None = None
    params: int | None = None
    bytes: int | None = None
    fraction: float | None = None
    min_rank: int = 0
    max_rank: int | None = None
    multiple_of: int = 1
    warmup: float = 0.05
    freeze: float = 0.3
    every: int = 10
    shape: str = "cubic"

    def __post_init__(self) -> None:
        given = self.given
        if len(given) != 1:
            got = ", ".join(f"{k}={v!r}" for k, v in given.items()) or "none of them"
            raise BudgetError(f"a RankBudget takes exactly one of ranks=, params=, bytes=, fraction=; got {got}")
        for name in ("ranks", "params", "bytes", "max_rank"):
            if getattr(self, name) is not None:
                self._settle(name, integer(name, getattr(self, name), 0, error=BudgetError))
        for name, lowest in (("min_rank", 0), ("multiple_of", 1), ("every", 1)):
            self._settle(name, integer(name, getattr(self, name), lowest, error=BudgetError))
        if self.fraction is not None:
            self._settle("fraction", number("fraction", self.fraction, 0, 1, error=BudgetError))
        for name in ("warmup", "freeze"):
            self._settle(name, number(name, getattr(self, name), 0, 1, error=BudgetError))
        if self.fraction == 0:
            raise BudgetError("fraction must be above 0; to prune every rank say ranks=0")
        if self.warmup + self.freeze >= 1:
            raise BudgetError(
                f"warmup={self.warmup} and freeze={self.freeze} leave no steps to choose ranks in; "
                "their sum must stay below 1"
            )
        choice("shape", self.shape, SHAPES, BudgetError)
        if self.max_rank is not None and self.min_rank > self.max_rank:
            raise BudgetError(f"min_rank={self.min_rank} is above max_rank={self.max_rank}")

    def _settle(self, name: str, value: float) -> None:
        """Store a plain Python number, which JSON can hold, for the one that was given."""
        object.__setattr__(self, name, value)

    @property
    def given(self) -> dict[str, int | float]:
        """The one quantity that was given, as {name: value}."""
        values = {name: getattr(self, name) for name in _QUANTITIES}
        return {name: value for name, value in values.items() if value is not None}

    def resolve(
        self, layers: Sequence[LayerShape], total_steps: int = 1, bytes_per_param: int = 4,
        most: str = "that the adapters start with", way_out: str = "lower it, or begin with a higher rank",
        finished: bool = False,
    ) -> BudgetPlan:
        """Check the budget against ``layers`` and a run of ``total_steps`` optimizer steps.

        ``most`` and ``way_out`` are for messages: what the layers' ranks are, and what to do when they are too low.
        ``finished`` layers may have less than ``min_rank``; they must then keep what they have.

        Raises:
            BudgetError: the budget is above the ranks that the layers start with or may keep, below the sum of
                their floors, or not a multiple of ``multiple_of``; the message gives both numbers.
        """
        total_steps = integer("total_steps", total_steps, 1, error=BudgetError)
        ranks = [layer.rank for layer in layers]
        floors, caps = self._bounds(layers, most, way_out, finished)
        unit, costs = self._costs(layers, bytes_per_param)
        initial, floor, ceiling = (_spent(costs, counts) for counts in (ranks, floors, caps))
        target = self._target(initial, min(costs, default=1) * self.multiple_of)
        if any(low > high for low, high in zip(floors, caps, strict=True)):
            raise BudgetError(
                f"min_rank={self.min_rank} and max_rank={self.max_rank} leave no multiple of {self.multiple_of} "
                "between them"
            )
        if target > initial:
            raise BudgetError(f"the budget of {target:,} {unit} is above the {initial:,} {most}; {way_out}")
        if target > ceiling:
            raise BudgetError(
                f"the budget of {target:,} {unit} cannot be spent: max_rank={self.max_rank} allows {ceiling:,}"
            )
        if target < floor:
            raise BudgetError(
                f"the budget of {target:,} {unit} is below the floor: min_rank={self.min_rank} on {len(floors)} "
                f"layers takes {floor:,}"
            )
        if unit == "ranks" and target % self.multiple_of:
            below = target // self.multiple_of * self.multiple_of
            raise BudgetError(
                f"ranks={target} is not a multiple of multiple_of={self.multiple_of}; say {below} or "
                f"{below + self.multiple_of}"
            )
        warmup_steps, freeze_step = self._steps(total_steps)
        return BudgetPlan(
            unit=unit, target=target, initial=initial, ceiling=ceiling, floor=floor, costs=costs,
            floors=floors, caps=caps, multiple_of=self.multiple_of, shape=self.shape, every=self.every,
            total_steps=total_steps, warmup_steps=warmup_steps, freeze_step=freeze_step,
            groups=_groups([layer.name for layer in layers]),
        )

    def _costs(self, layers: Sequence[LayerShape], bytes_per_param: int) -> tuple[Unit, tuple[int, ...]]:
        """The unit of the budget, and what one rank of each layer costs in it."""
        unit: Unit = "ranks" if self.ranks is not None else "bytes" if self.bytes is not None else "params"
        return unit, tuple(_cost(layer, unit, bytes_per_param) for layer in layers)

    def _bounds(
        self, layers: Sequence[LayerShape], most: str, way_out: str, finished: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The lowest and the highest rank of each layer, in whole multiples."""
        step = self.multiple_of
        for layer in layers:
            if layer.rank % step:
                raise BudgetError(
                    f"multiple_of={step} does not divide the initial rank {layer.rank} of {layer.name}; "
                    f"attach with rank={max(step, layer.rank // step * step)}"
                )
            if self.min_rank > layer.rank and not finished:
                raise BudgetError(
                    f"min_rank={self.min_rank} is above the {layer.rank} {most} in {layer.name}; {way_out}"
                )
        floor = -(-self.min_rank // step) * step
        floors = tuple(min(floor, layer.rank) if finished else floor for layer in layers)
        highest = [layer.rank if self.max_rank is None else min(layer.rank, self.max_rank) for layer in layers]
        return floors, tuple(rank // step * step for rank in highest)

    def _target(self, initial: int, cheapest: int) -> int:
        """The budget at the end, in its unit; ``initial`` is what the layers start with, ``cheapest`` the cost of the
        cheapest step of ranks in any layer."""
        (name, value), = self.given.items()
        if name != "fraction":
            return int(value)
        target = share_of(value, initial)
        if target < cheapest:
            raise BudgetError(
                f"fraction={value} of {initial:,} parameters is {target:,}, and the cheapest rank costs {cheapest:,}; "
                "raise it, or to prune every rank say ranks=0"
            )
        return target

    def _steps(self, total_steps: int) -> tuple[int, int]:
        """The last step of the warm-up, and the step at which ranks freeze."""
        freeze_step = max(1, total_steps - _nearest(self.freeze * total_steps))
        return min(_nearest(self.warmup * total_steps), freeze_step - 1), freeze_step


@dataclass(frozen=True)
class BudgetPlan:
    """A budget resolved for given layers: whole units, exact steps. ``costs``, ``floors`` and ``caps`` are per layer
    (cost of one rank, lowest and highest rank), and so are ``groups``: layers of one module type have the same index,
    whatever their block."""

    unit: Unit
    target: int
    initial: int
    ceiling: int
    floor: int
    costs: tuple[int, ...]
    floors: tuple[int, ...]
    caps: tuple[int, ...]
    multiple_of: int
    shape: str
    every: int
    total_steps: int
    warmup_steps: int
    freeze_step: int
    groups: tuple[int, ...] = ()

    def asked(self, step: int) -> int:
        """The budget at optimizer step ``step`` (counted from 1), in :attr:`unit`.

        AdaLoRA (arXiv 2303.10512), eq. 12, with the cube replaced by the exponent of the shape.
        """
        if step <= self.warmup_steps:
            return self.initial
        if step >= self.freeze_step:
            return self.target
        progress = (step - self.warmup_steps) / (self.freeze_step - self.warmup_steps)
        start = min(self.initial, self.ceiling)
        left = 0.0 if self.shape == "constant" else (1 - progress) ** SHAPES[self.shape]
        asked = math.floor(self.target + (start - self.target) * left + 1e-9)
        if self.unit == "ranks":
            asked = asked // self.multiple_of * self.multiple_of
        return max(asked, self.floor)

    def allocates(self, step: int) -> bool:
        """Whether ranks are allocated after optimizer step ``step``. The freeze always is."""
        inside = self.warmup_steps < step < self.freeze_step
        return step == self.freeze_step or (inside and (step - self.warmup_steps) % self.every == 0)

    def spent(self, ranks: Sequence[int]) -> int:
        """The cost of these live ranks, in :attr:`unit`."""
        return _spent(self.costs, ranks)

    @property
    def cheapest(self) -> int:
        """The cost of the cheapest step of ranks in any layer, in :attr:`unit`."""
        return min(self.costs) * self.multiple_of

    def require_spendable(self) -> None:
        """Raise BudgetError when the target is above zero and still buys no rank."""
        if 0 < self.target < self.cheapest:
            raise BudgetError(
                f"the budget of {self.target:,} {self.unit} buys no rank: the cheapest costs {self.cheapest:,}; raise "
                "it, or to prune every rank say ranks=0"
            )


def budget_of(shapes: Sequence[LayerShape], budget: RankBudget, bytes_per_param: int = 4) -> RankBudget:
    """``budget`` restated for adapters that begin at their final ranks: the cost of ``shapes``, in the same unit; a
    fraction becomes a number of parameters."""
    unit = "ranks" if budget.ranks is not None else "bytes" if budget.bytes is not None else "params"
    spent = _spent([_cost(shape, unit, bytes_per_param) for shape in shapes], [shape.rank for shape in shapes])
    quantities: dict[str, Any] = {**dict.fromkeys(_QUANTITIES), unit: spent}
    return replace(budget, **quantities)


def in_ranks(budget: RankBudget, initial: int) -> RankBudget:
    """``budget`` with its fraction as a share of ``initial`` ranks, which is what it was in the first runs of 0.1."""
    assert budget.fraction is not None, "only a fraction has had two meanings"
    ranks = share_of(budget.fraction, initial) // budget.multiple_of * budget.multiple_of
    return replace(budget, fraction=None, ranks=ranks)


def share_of(fraction: float, amount: int) -> int:
    """``fraction`` of ``amount``, rounded down: 0.29 · 100 is 28.999… in floating point, and 29 all the same."""
    return math.floor(fraction * amount * (1 + 1e-12) + 1e-9)


def _cost(shape: LayerShape, unit: str, bytes_per_param: int) -> int:
    """The cost of one rank of a layer."""
    return {"ranks": 1, "params": shape.params_per_rank, "bytes": shape.params_per_rank * bytes_per_param}[unit]


def _spent(costs: Sequence[int], ranks: Sequence[int]) -> int:
    return sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))


def _groups(names: Sequence[str]) -> tuple[int, ...]:
    roles = [role for _, role in places(names)]
    index = {role: number for number, role in enumerate(dict.fromkeys(roles))}
    return tuple(index[role] for role in roles)


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)
