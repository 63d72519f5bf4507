"""What is compared: arms, the budgets they share, the rates they are tried at, and the configuration of one run.

An arm is written METHOD or METHOD/CONTROL:

    uniform                plain LoRA with equal ranks: the one to beat
    adalora                a method, from its peak rank down to the budget
    adalora/uniform        its forced-uniform twin: the difference to it is the placement's own share
    adalora/random         its ranks drawn by chance
    adalora/shuffled       its ranks handed to other layers
    uniform/truncated      plain LoRA of the peak rank, cut to the budget after training (truncation.py)

The scaling alpha / rank is 2 at every rank, so that it is not part of the comparison. Every arm has its own rate.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankalloc.errors import ConfigError
from rankalloc.experiments.config import RunConfig
from rankalloc.methods import PLACEMENTS, find_method

from ..common.grid import Grid

SCALING = 2.0
PEAK, HIGHEST_PEAK = 4, 12
ARMS = ("uniform", "auto", "auto/uniform", "uniform/truncated")
RATES = {"lora": (2e-3, 4e-3, 8e-3), "svd": (4e-3, 8e-3, 1.6e-2), "gate": (2e-3, 4e-3, 8e-3)}
"""First rates by parametrisation; B·A learns faster than P·Λ·Q from Λ = 0."""


@dataclass(frozen=True)
class Arm:
    """One arm. ``control`` is a placement, "truncated", or empty."""

    method: str
    control: str = ""

    def __str__(self) -> str:
        return f"{self.method}/{self.control}" if self.control else self.method

    @property
    def options(self) -> dict[str, str]:
        """The method's options in this arm."""
        return {"placement": self.control} if self.control in PLACEMENTS else {}

    @property
    def from_peak(self) -> bool:
        """Whether training begins above the budget."""
        return self.method != "uniform" or self.control == "truncated"

    @property
    def rates_of(self) -> Arm:
        """The arm whose best rate this one trains at: its own, but for the controls that differ from their method in
        the placement alone."""
        return Arm(self.method) if self.control in ("random", "shuffled") else self

    @property
    def twin(self) -> Arm | None:
        """The forced-uniform twin, for an arm that chooses or misplaces ranks."""
        return Arm(self.method, "uniform") if self.method != "uniform" and self.control != "uniform" else None


def arm_of(text: str) -> Arm:
    """The arm that ``text`` names; ConfigError when there is none."""
    method, _, control = text.partition("/")
    allowed = ("", "truncated") if method == "uniform" else ("", *PLACEMENTS[1:])
    if control not in allowed:
        raise ConfigError(f"arm {text!r}: {method} has the controls {', '.join(allowed[1:])}, got {control!r}")
    find_method(method)
    return Arm(method, control)


def peak_rank(rank: int) -> int:
    """The rank adaptive arms begin at for a final mean rank."""
    return max(rank, min(PEAK * rank, HIGHEST_PEAK))


def grid_of(arm: Arm) -> Grid:
    """The rates ``arm`` is tried at."""
    return Grid(RATES[find_method(arm.method).init])


def configured(base: RunConfig, arm: Arm, rank: int, params_per_rank: int, rate: float, seed: int) -> RunConfig:
    """The run of ``arm`` at the budget that uniform LoRA of ``rank`` takes.

    Args:
        base: the task's settings.
        params_per_rank: d_in + d_out summed over all adapted layers.
    """
    start = peak_rank(rank) if arm.from_peak else rank
    final = start if arm.control == "truncated" else rank
    return base.replaced({
        "method": arm.method, "method_options": arm.options, "seed": seed, "training.learning_rate": rate,
        "adapter.rank": start, "adapter.alpha": SCALING * start,
        "budget.params": final * params_per_rank, "budget.fraction": None,
    })  # fmt: skip
