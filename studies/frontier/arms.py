"""What is compared, and the configuration of one run of each arm."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rankalloc.budget import LayerShape
from rankalloc.experiments.config import RunConfig, load_config
from rankalloc.experiments.tasks import prepare
from rankalloc.experiments.tasks.base import PreparedTask
from rankalloc.methods.planners.planning import layer_shapes

from ..common.grid import Grid

HERE = Path(__file__).parent
TASKS = ("punctuation", "pos")
RANKS = (1, 2, 4, 8, 16, 32)
"""The budgets: the parameters of so many ranks in every layer."""

UNIFORM, LORA, AUTO, DYLORA, MATRYOSHKA, ANNEALED = (
    "uniform", "LoRA", "auto", "DyLoRA", "Matryoshka", "annealed",
)
ARMS = (UNIFORM, LORA, AUTO, DYLORA, MATRYOSHKA, ANNEALED)
"""``UNIFORM`` is a run of its own at every budget, and all others one run for all budgets. ``LORA`` is uniform LoRA of
the highest rank, cut afterwards (LoRA-Squeeze's Post, arXiv 2602.10993); ``ANNEALED`` loses ranks in training, equally
in every layer, and leaves an adapter at every budget that it passes (after its In)."""

CUT, RECOVERED = "cut", "recovered"
RECOVERING = (LORA, AUTO)
"""Arms whose cuts are also judged after a few further steps."""

SCALING = 2.0
_GRIDS = {AUTO: Grid((4e-3, 8e-3, 1.6e-2)), ANNEALED: Grid((4e-3, 8e-3, 1.6e-2))}
_LORA = Grid((2e-3, 4e-3, 8e-3))


class Cell(NamedTuple):
    """What identifies a run. ``phase`` is "rates" or "seeds"; ``rank`` is that of the budget for :data:`UNIFORM`, else
    the highest."""

    task: str
    phase: str
    arm: str
    rank: int
    rate: float
    steps: int
    seed: int


def grid_of(arm: str) -> Grid:
    """The rates that an arm is tried at."""
    return _GRIDS.get(arm, _LORA)


def ranks_of(arm: str) -> Sequence[int]:
    """The highest ranks of an arm's runs: one for every budget, or one for all."""
    return RANKS if arm == UNIFORM else RANKS[-1:]


def served_by(arm: str, rank: int) -> Sequence[int]:
    """The budgets that a run answers."""
    return (rank,) if arm == UNIFORM else RANKS


def further_steps(steps: int) -> int:
    """Those of a recovery: a tenth of the run's."""
    return max(1, round(steps / 10))


@functools.cache
def task_of(name: str) -> tuple[RunConfig, PreparedTask, tuple[LayerShape, ...]]:
    """The settings that all arms share, the task, and the layers that are adapted; once in each process."""
    config = load_config(HERE / f"{name}.yaml", [])
    task = prepare(config)
    return config, task, tuple(layer_shapes(task.build_model(), 1))


def params_of(shapes: Sequence[LayerShape], rank: int) -> int:
    """The parameters of a budget."""
    return rank * sum(shape.params_per_rank for shape in shapes)


def configuration(cell: Cell) -> RunConfig:
    """The configuration of a run."""
    shared, _, shapes = task_of(cell.task)
    return shared.replaced({
        "seed": cell.seed, "training.steps": cell.steps, "training.learning_rate": cell.rate,
        "adapter.rank": cell.rank, "adapter.alpha": SCALING * cell.rank, "budget.fraction": 1.0,
        **_of_arm(cell, shapes),
    })  # fmt: skip


def _of_arm(cell: Cell, shapes: Sequence[LayerShape]) -> dict[str, Any]:
    if cell.arm in (DYLORA, MATRYOSHKA):
        # at rank b the scale is that of LoRA of rank b: alpha / √b, as in studies/dylora
        nested = {"adapter.scale": "rslora", "adapter.alpha": SCALING * math.sqrt(cell.rank)}
        return {"method": cell.arm.lower(), **(nested if cell.arm == DYLORA else {})}
    if cell.arm == ANNEALED:
        return {
            "method": "singular-value", "method_options": {"placement": "uniform"}, "budget.fraction": None,
            "budget.params": params_of(shapes, RANKS[0]), "budget.freeze": 0.1, "budget.every": 2,
            "budget.shape": "linear",
        }  # fmt: skip
    return {"method": "auto" if cell.arm == AUTO else "uniform"}
