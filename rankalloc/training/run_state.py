"""The state of one run: allocation and resuming work on it, and the controller is their public face."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..adapters.adapter_set import Adapters
from ..budget import BudgetPlan
from ..methods.rules import Rule
from ..methods.scores import Score
from ..trace import RankTrace
from .settings import Settings


@dataclass(eq=False)
class RunState:
    """Everything about a run that changes from step to step.

    Attributes:
        adapters: whose ranks are chosen.
        settings: what does not change.
        schedule: the budget resolved for these layers; a resumed run has that of its beginning.
        rule: what happens around each step.
        score: what triplets are worth; None for a method without one, and once ranks are final.
        trace: the record of the run.
        averages: averages of the weights that follow, as adapters of their own.
        step: optimizer steps so far.
        idle: names of the adapters that have had no gradient yet, of those that began with a rank.
    """

    adapters: Adapters
    settings: Settings
    schedule: BudgetPlan
    rule: Rule
    score: Score | None
    trace: RankTrace
    averages: list[Adapters] = field(default_factory=list)
    step: int = 0
    idle: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.idle = [name for name, adapter in self.adapters.modules.items() if adapter.rank]

    def see_gradients(self) -> None:
        """Take adapters that have a gradient now off :attr:`idle`."""
        modules = self.adapters.modules
        self.idle = [n for n in self.idle if all(p.grad is None for p in modules[n].trained())]

    @property
    def frozen(self) -> bool:
        """Whether ranks are final."""
        return self.trace.finished or self.step >= self.schedule.freeze_step

    def new_score(self) -> Score | None:
        """The method's score over the adapters as they are now, with empty state."""
        return self.settings.new_score(list(self.adapters))

    def reschedule(self, schedule: BudgetPlan) -> None:
        """Go by ``schedule`` from now on; the rule too."""
        self.schedule = self.rule.plan = schedule
