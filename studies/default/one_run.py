"""One run of the study, from its cell to its record. The task is prepared once in each process."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from rankalloc.errors import RankallocError
from rankalloc.experiments.config import RunConfig, load_config
from rankalloc.experiments.run_folder import ADAPTER_NAME
from rankalloc.experiments.runner import train
from rankalloc.experiments.tasks import prepare
from rankalloc.experiments.tasks.base import PreparedTask, evaluate
from rankalloc.files import sha256_of
from rankalloc.methods.planners.planning import layer_shapes

from ..common import memory
from .arms import arm_of, configured
from .truncation import truncate

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """What identifies a run: two runs of one cell are the same run.

    Attributes:
        task: the name of a YAML file beside this one, without its ending, or a path to one.
        budget: the rank of the uniform LoRA of that size.
        steps: None for those in the file.
        splits: the splits that are evaluated.
    """

    task: str
    budget: int
    arm: str
    rate: float
    seed: int
    steps: int | None
    splits: tuple[str, ...]


def settings(task: str, steps: int | None) -> RunConfig:
    """The task's settings, with another number of steps when one is given."""
    return load_config(_file(task), [f"training.steps={steps}"] if steps else [])


def settings_id(task: str) -> str:
    """A name for everything the task's file sets, apart from the paths of its data and the number of steps.

    Runs under other settings are other runs.
    """
    tree = yaml.safe_load(_file(task).read_text(encoding="utf-8"))
    kept = {key: value for key, value in tree.items() if key not in ("name", "task")}
    kept["training"] = {key: value for key, value in kept.get("training", {}).items() if key != "steps"}
    return sha256_of(json.dumps(kept, sort_keys=True))[:12]


def _file(task: str) -> Path:
    return Path(task) if task.endswith(".yaml") else HERE / f"{task}.yaml"


@functools.lru_cache(maxsize=4)
def _prepared(task: str) -> tuple[PreparedTask, int]:
    """The task, and d_in + d_out summed over the layers that are adapted."""
    prepared = prepare(settings(task, None))
    return prepared, sum(shape.params_per_rank for shape in layer_shapes(prepared.build_model(), 1))


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train and evaluate one cell. A run that diverges has a "message" and no metrics."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    prepared, params_per_rank = _prepared(cell.task)
    arm = arm_of(cell.arm)
    base = settings(cell.task, cell.steps)
    config = configured(base, arm, cell.budget, params_per_rank, cell.rate, cell.seed)
    record = {
        "task": Path(cell.task).stem, "budget": cell.budget, "arm": cell.arm, "method": arm.method,
        "options": arm.options, "rate": cell.rate, "seed": cell.seed, "steps": config.training.steps,
        "metric": prepared.metric, "direction": prepared.direction, "data": prepared.fingerprint,
        "budget_params": cell.budget * params_per_rank,
    }  # fmt: skip
    memory.forget_peak()
    started, worked = time.perf_counter(), time.process_time()
    try:
        with tempfile.TemporaryDirectory() as folder:
            truncated = arm.control == "truncated"
            trace = train(config, Path(folder), prepared=prepared, splits=() if truncated else cell.splits)
            evaluations = {evaluation.split: evaluation for evaluation in trace.evaluations}
            ranks, params = trace.final_ranks, trace.adapter_params_final
            if truncated:
                model = prepared.build_model()
                adapters = truncate(model, Path(folder, ADAPTER_NAME), record["budget_params"])
                ranks, params = list(adapters.ranks().values()), adapters.num_params()
                batch = config.training.eval_batch_size
                evaluations = {split: evaluate(prepared, model, split, batch) for split in cell.splits}
    except RankallocError as error:
        if type(error) is not RankallocError:  # a mistake in the settings, not an outcome
            raise
        return {**record, "message": str(error), "seconds": round(time.perf_counter() - started, 2)}
    return {
        **record, "final_params": params, "peak_params": trace.adapter_params_initial, "final_ranks": ranks,
        **{split: evaluation.metrics for split, evaluation in evaluations.items()},
        "seconds": round(time.perf_counter() - started, 2), "cpu_seconds": round(time.process_time() - worked, 2),
        "peak_memory_bytes": memory.peak_bytes(),
    }  # fmt: skip
