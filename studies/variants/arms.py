"""What is compared, the configuration of one run, and the run itself."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rankalloc.errors import RankallocError
from rankalloc.experiments.config import RunConfig
from rankalloc.experiments.runner import attach_for, train
from rankalloc.methods.planners.planning import layer_shapes

from ..common.training import SHORT_PUNCTUATION, short_punctuation

REFERENCE = "LoRA"
SPLITS = {"rates": "tune", "seeds": "report"}
"""The split on which a run of each phase is evaluated."""

ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"rates": (2e-3, 4e-3, 8e-3)},
    "rsLoRA": {"rates": (2e-3, 4e-3, 8e-3), "adapter.scale": "rslora"},
    "LoRA+": {"rates": (2.5e-4, 5e-4, 1e-3), "training.plus_ratio": 16.0},
    "LoRA-FA": {"rates": (4e-3, 8e-3, 1.6e-2), "adapter.init": "lora-fa"},
    "LoRA-FA, rank × 2": {"rates": (4e-3, 8e-3, 1.6e-2), "adapter.init": "lora-fa", "times": 2},
    "VeRA, rank 256": {
        "rates": (2e-3, 4e-3, 8e-3), "adapter.init": "vera", "training.plus_ratio": 10.0, "rank": 256, "alpha": 256.0,
    },
    "auto": {"rates": (4e-3, 8e-3, 1.6e-2), "method": "auto", "times": 2},
    "auto, ranks uniform": {
        "rates": (4e-3, 8e-3, 1.6e-2), "method": "auto", "method_options": {"placement": "uniform"}, "times": 2,
    },
}  # fmt: skip
"""How each arm differs from plain LoRA of the study's rank at alpha / rank = 2, and the first rates it is tried at.

Keys are those of the configuration, besides "times" (the rank at the start, as a multiple) and "rank" and "alpha" where
an arm has its own. Rates are those of Q and of the task's head; P, Λ and VeRA's vectors have "training.plus_ratio"
times them."""


class Cell(NamedTuple):
    """What identifies a run."""

    phase: str
    arm: str
    rank: int
    rate: float
    steps: int
    seed: int


def configuration(cell: Cell) -> RunConfig:
    """The configuration of a run. An arm that chooses ranks ends with the parameters of uniform LoRA of the rank."""
    own = dict(ARMS[cell.arm])
    start = own.pop("rank", cell.rank * own.pop("times", 1))
    values = {
        "name": "variants", "method": "uniform", "seed": cell.seed, "training.steps": cell.steps,
        "training.learning_rate": cell.rate, "training.eval_batch_size": 16, "training.warmup_steps": 10,
        **{f"data.{key}": value for key, value in SHORT_PUNCTUATION.items()},
        "adapter.rank": start, "adapter.alpha": own.pop("alpha", 2.0 * start), "budget.fraction": 1.0,
        **{key: value for key, value in own.items() if key != "rates"},
    }  # fmt: skip
    if values["method"] == "auto":
        per_rank = sum(shape.params_per_rank for shape in layer_shapes(short_punctuation().build_model(), 1))
        values |= {
            "budget.fraction": None, "budget.params": cell.rank * per_rank, "budget.every": 4, "budget.freeze": 0.4,
        }  # fmt: skip
    return RunConfig().replaced(values)


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train and evaluate once. A run that diverges has a "message" and no metrics."""
    torch.set_num_threads(1)
    task, config, split = short_punctuation(), configuration(cell), SPLITS[cell.phase]
    adapters, _ = attach_for(config, task.build_model(), task)
    record = {**cell._asdict(), "trained_peak": adapters.trainable_params(), "data": task.fingerprint}
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            trace = train(config, Path(folder), prepared=task, splits=(split,))
    except RankallocError as error:
        if type(error) is not RankallocError:  # a mistake in the settings, not an outcome
            raise
        return {**record, "message": str(error), "seconds": round(time.perf_counter() - started, 1)}
    chooses = config.method == "auto"
    live = trace.adapter_params_final + sum(trace.final_ranks) if chooses else record["trained_peak"]
    return {
        **record, "trained_final": live, "file_params": trace.adapter_params_final, split: trace.evaluations[0].metrics,
        "step_seconds": trace.step_seconds_after_freeze, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
