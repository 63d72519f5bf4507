"""What may be spent on ranks, and its course over the steps of a run. Pure: no torch.

A :class:`RankBudget` is what the user says. :meth:`RankBudget.resolve` holds it against the
layers it is for and returns a :class:`BudgetPlan` in whole units with exact steps, or one clear
error. Costs count the plain LoRA that ships: d_in + d_out parameters for each rank of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import BudgetError, unknown
from .layer_names import places

SHAPES = {"cubic": 3, "linear": 1, "constant": 0}
"""Course of the budget between warm-up and freeze: the exponent of (1 - progress)."""


@dataclass(frozen=True)
class LayerShape:
    """One adapted layer: ``d_in`` and ``d_out`` of its weight, and the rank it starts with."""

    name: str
    d_in: int
    d_out: int
    rank: int

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
        fraction: share of the initial ranks, in (0, 1]; rounded down to whole ranks.
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
    warmup: float = 0.1
    freeze: float = 0.3
    every: int = 10
    shape: str = "cubic"

    def __post_init__(self) -> None:
        given = self.given
        if len(given) != 1:
            got = ", ".join(f"{k}={v!r}" for k, v in given.items()) or "none of them"
            raise BudgetError(f"a RankBudget takes exactly one of ranks=, params=, bytes=, fraction=; got {got}")
        for name in ("ranks", "params", "bytes", "min_rank", "max_rank", "multiple_of", "every"):
            value = getattr(self, name)
            lowest = 1 if name in ("multiple_of", "every") else 0
            if value is None and name not in ("min_rank", "multiple_of", "every"):
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < lowest:
                raise BudgetError(f"{name} must be a whole number of at least {lowest}, got {value!r}")
        for name in ("fraction", "warmup", "freeze"):
            value = getattr(self, name)
            if value is None and name == "fraction":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise BudgetError(f"{name} is a fraction between 0 and 1, got {value!r}")
        if self.fraction == 0:
            raise BudgetError("fraction must be above 0; to prune every rank say ranks=0")
        if self.warmup + self.freeze >= 1:
            raise BudgetError(
                f"warmup={self.warmup} and freeze={self.freeze} leave no steps to choose ranks in; "
                "their sum must stay below 1"
            )
        if self.shape not in SHAPES:
            raise BudgetError(unknown("shape", self.shape, SHAPES))
        if self.max_rank is not None and self.min_rank > self.max_rank:
            raise BudgetError(f"min_rank={self.min_rank} is above max_rank={self.max_rank}")

    @property
    def given(self) -> dict[str, int | float]:
        """The one quantity that was given, as {name: value}."""
        quantities = {name: getattr(self, name) for name in ("ranks", "params", "bytes", "fraction")}
        # numpy's whole numbers are welcome and become plain ones, which JSON can hold
        plain = {
            n: v.__index__() if hasattr(v, "__index__") and not isinstance(v, bool) else v
            for n, v in quantities.items()
        }
        return {name: value for name, value in plain.items() if value is not None}

    def resolve(
        self, layers: Sequence[LayerShape], total_steps: int = 1, bytes_per_param: int = 4,
        most: str = "that the adapters start with", way_out: str = "lower it, or begin with a higher rank",
        finished: bool = False,
    ) -> BudgetPlan:
        """Hold the budget against ``layers`` and a run of ``total_steps`` optimizer steps.

        ``most`` and ``way_out`` are for messages: what the layers' ranks are, and what to do when they are too few.
        ``finished`` layers may hold less than ``min_rank``; they are not to lose what they have.

        Raises:
            BudgetError: the budget is above what the layers start with or may keep, below the
                floor's total, or no multiple of ``multiple_of``; the message gives both numbers.
        """
        if isinstance(total_steps, bool) or not hasattr(total_steps, "__index__") or total_steps < 1:
            raise BudgetError(f"total_steps must be a whole number of at least 1, got {total_steps!r}")
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
        (name, value), = self.given.items()
        unit = "ranks" if name == "fraction" else name
        per_rank = {"ranks": 0, "params": 1, "bytes": bytes_per_param}[unit]
        costs = tuple(layer.params_per_rank * per_rank if per_rank else 1 for layer in layers)
        floor = -(-self.min_rank // step) * step
        floors = tuple(min(floor, layer.rank) if finished else floor for layer in layers)
        highest = [layer.rank if self.max_rank is None else min(layer.rank, self.max_rank) for layer in layers]
        caps = tuple(rank // step * step for rank in highest)
        initial = sum(cost * layer.rank for cost, layer in zip(costs, layers, strict=True))
        # a fraction such as 0.29 of 100 is 28.999…: rounding down must not eat a whole rank
        target = math.floor(value * initial + 1e-9) // step * step if name == "fraction" else int(value)
        if name == "fraction" and target == 0:
            raise BudgetError(
                f"fraction={value} of {initial:,} ranks is less than one step of {step}; raise it, or to prune every "
                "rank say ranks=0"
            )
        floor_total = sum(cost * floor for cost, floor in zip(costs, floors, strict=True))
        cap_total = sum(cost * cap for cost, cap in zip(costs, caps, strict=True))
        if any(floor > cap for floor, cap in zip(floors, caps, strict=True)):
            raise BudgetError(
                f"min_rank={self.min_rank} and max_rank={self.max_rank} leave no multiple of {step} between them"
            )
        if target > initial:
            raise BudgetError(
                f"the budget of {target:,} {unit} is above the {initial:,} {most}; {way_out}"
            )
        if target > cap_total:
            raise BudgetError(
                f"the budget of {target:,} {unit} cannot be spent: max_rank={self.max_rank} allows {cap_total:,}"
            )
        if target < floor_total:
            raise BudgetError(
                f"the budget of {target:,} {unit} is below the floor: min_rank={self.min_rank} on {len(floors)} "
                f"layers takes {floor_total:,}"
            )
        if unit == "ranks" and target % step:
            raise BudgetError(
                f"ranks={target} is no multiple of multiple_of={step}; say {target // step * step} or "
                f"{-(-target // step) * step}"
            )
        freeze_step = max(1, total_steps - _nearest(self.freeze * total_steps))
        warmup_steps = min(_nearest(self.warmup * total_steps), freeze_step - 1)
        return BudgetPlan(
            unit=unit, target=target, initial=initial, ceiling=cap_total, floor=floor_total, costs=costs,
            floors=floors, caps=caps, multiple_of=step, shape=self.shape, every=self.every,
            total_steps=total_steps, warmup_steps=warmup_steps, freeze_step=freeze_step,
            groups=_groups([layer.name for layer in layers]),
        )


@dataclass(frozen=True)
class BudgetPlan:
    """A budget resolved for given layers: whole units, exact steps. ``costs``, ``floors`` and
    ``caps`` are per layer (cost of one rank, lowest and highest rank), and so are ``groups``: layers of
    one module type, whatever their block, have the same index."""

    unit: str
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
        """What these live ranks cost, in :attr:`unit`."""
        return sum(cost * rank for cost, rank in zip(self.costs, ranks, strict=True))


def _groups(names: Sequence[str]) -> tuple[int, ...]:
    roles = [role for _, role in places(names)]
    index = {role: number for number, role in enumerate(dict.fromkeys(roles))}
    return tuple(index[role] for role in roles)


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)
