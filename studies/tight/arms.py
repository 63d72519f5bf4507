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
from .hand import HAND, QUERY_VALUE, ranks_of

HERE = Path(__file__).parent
TASKS = ("punctuation", "pos")
SIZES = {"an eighth": 1 / 8, "a quarter": 1 / 4, "a half": 1 / 2, "one": 1.0}
"""{size: its share of the parameters of one rank in every layer}."""

AUTO, EQUAL, RANDOM, SHUFFLED, ADALORA, EVERYWHERE, VERA, XS = (
    "auto", "auto, equal ranks", "auto, random ranks", "auto, shuffled ranks", "AdaLoRA", "every layer", "VeRA",
    "LoRA-XS",
)
ARMS = (AUTO, *HAND, QUERY_VALUE, EVERYWHERE, EQUAL, ADALORA, VERA, XS, RANDOM, SHUFFLED)
AS_AUTO = (RANDOM, SHUFFLED)
"""Controls that differ from auto in the placement alone, and train at its rate."""

PEAK_RANK, SCALING = 4, 2.0
_TRIPLETS = Grid((7e-3, 1e-2, 1.4e-2), math.sqrt(2))
_LORA = Grid((8e-3, 1.13e-2, 1.6e-2), math.sqrt(2))
_FIXED = Grid((4e-3, 8e-3, 1.6e-2), 2.0)
GRIDS = {AUTO: _TRIPLETS, EQUAL: _TRIPLETS, ADALORA: _TRIPLETS, VERA: _FIXED, XS: _FIXED}
"""The rates that an arm is tried at; others are B·A, whose rates are ``_LORA``."""


class Cell(NamedTuple):
    """What identifies a run. ``phase`` is "rates" or "seeds"."""

    task: str
    size: str
    phase: str
    arm: str
    rate: float
    steps: int
    seed: int


def grid_of(arm: str) -> Grid:
    """The rates that an arm is tried at."""
    return GRIDS.get(arm, _LORA)


@functools.cache
def task_of(name: str) -> tuple[RunConfig, PreparedTask, tuple[LayerShape, ...]]:
    """The settings that all arms share, the task, and the layers that can be adapted; once in each process."""
    config = load_config(HERE / f"{name}.yaml", [])
    task = prepare(config)
    return config, task, tuple(layer_shapes(task.build_model(), PEAK_RANK))


def params_of(shapes: Sequence[LayerShape], size: str) -> int:
    """The parameters of a size."""
    return int(sum(shape.params_per_rank for shape in shapes) * SIZES[size])


def fits(arm: str, size: str) -> bool:
    """Whether an arm can be as small as that: a rank in every layer takes all of the largest size."""
    return arm not in (EVERYWHERE, EQUAL) or size == "one"


def configuration(cell: Cell) -> RunConfig:
    """The configuration of a run."""
    shared, _, shapes = task_of(cell.task)
    params = params_of(shapes, cell.size)
    values = {"seed": cell.seed, "training.steps": cell.steps, "training.learning_rate": cell.rate}
    return shared.replaced(values | _of_arm(cell.arm, shapes, params))


def _of_arm(arm: str, shapes: Sequence[LayerShape], params: int) -> dict[str, Any]:
    if arm in (AUTO, EQUAL, RANDOM, SHUFFLED, ADALORA):
        placement = {EQUAL: "uniform", RANDOM: "random", SHUFFLED: "shuffled"}.get(arm)
        return {
            "method": "adalora" if arm == ADALORA else "auto",
            "method_options": {"placement": placement} if placement else {}, **_rank(PEAK_RANK),
            "budget.fraction": None, "budget.params": params, "budget.freeze": 0.4, "budget.every": 4,
        }  # fmt: skip
    if arm == VERA:
        return {**_rank(vera_rank(shapes, params)), "adapter.init": "vera", **_vera_layers(shapes, params), **_WHOLE}
    if arm == XS:
        return {**_rank(math.isqrt(params // len(shapes))), "adapter.init": "lora-xs", **_WHOLE}
    ranks = {shape.name: 1 for shape in shapes} if arm == EVERYWHERE else ranks_of(arm, shapes, params)
    spent = sum(shape.params_per_rank * ranks[shape.name] for shape in shapes)
    return {
        "method": "manual", "method_options": {"rank_pattern": ranks}, **_rank(max(ranks.values())),
        "budget.fraction": None, "budget.params": spent,
    }  # fmt: skip


_WHOLE = {"method": "uniform", "budget.fraction": 1.0}


def _rank(rank: int) -> dict[str, Any]:
    return {"adapter.rank": rank, "adapter.alpha": SCALING * rank}


def _vera_layers(shapes: Sequence[LayerShape], params: int) -> dict[str, Any]:
    """All layers where their output scales fit the size, else query and value, as in its paper."""
    return {} if sum(shape.d_out + 1 for shape in shapes) <= params else {"adapter.target_modules": ["query", "value"]}


def vera_rank(shapes: Sequence[LayerShape], params: int) -> int:
    """The rank at which VeRA trains ``params`` numbers, r + d_out in each of its layers."""
    own = [s for s in shapes if not _vera_layers(shapes, params) or s.name.endswith(("query", "value"))]
    return (params - sum(shape.d_out for shape in own)) // len(own)
