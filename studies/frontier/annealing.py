"""A run that loses ranks while it trains, and leaves an adapter at every budget that it passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

import rankalloc as ra
from rankalloc.adapters.adapter_set import Adapters
from rankalloc.experiments.config import RunConfig
from rankalloc.experiments.runner import attach_for
from rankalloc.experiments.tasks.base import PreparedTask, base_of
from rankalloc.experiments.trainer import arguments_for, trainer_for


class Passing(TrainerCallback):
    """Saves the adapters before the allocation that takes them below a budget; it has to come before the ranks' own
    callback.

    Args:
        budgets: {rank: parameters}.
    """

    def __init__(self, adapters: Adapters, ranking: ra.RankCallback, budgets: dict[int, int], folder: Path) -> None:
        self.adapters, self.ranking, self.left, self.folder = adapters, ranking, dict(budgets), folder

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.ranking.controller is not None  # made when training began
        schedule, step = self.ranking.controller.schedule, state.global_step + 1
        if schedule.allocates(step):
            self.keep([rank for rank, params in self.left.items() if schedule.asked(step) < params])

    def keep(self, ranks: list[int]) -> None:
        """Save for these budgets what there is now."""
        for rank in ranks:
            del self.left[rank]
            ra.save(self.adapters, self.folder / str(rank))


def train_annealed(config: RunConfig, task: PreparedTask, budgets: dict[int, int], folder: Path) -> None:
    """Train, and write an adapter of at least its budget into ``folder``/RANK for each of ``budgets``."""
    set_seed(config.seed)
    model = base_of(task)
    adapters, budget = attach_for(config, model, task)
    ranking = ra.RankCallback(adapters, budget, config.method, save_trace=False, **config.method_options)
    passing = Passing(adapters, ranking, budgets, folder)
    with trainer_for(config, model, adapters, task, arguments_for(config, task, folder), [passing, ranking]) as trainer:
        trainer.train()
    passing.keep(list(passing.left))
