"""One run of an audit: trained, cut where its arm says so, and judged from the file that would ship.

Every adapter of ours is evaluated after it was saved and loaded again, as a user would meet it. PEFT's AdaLoRA is
evaluated where it was trained.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ...budget import RankBudget
from ...errors import RankallocError
from ...posthoc.shrinking import shrink
from ...trace import EvaluationRecord
from ..config import RunConfig
from ..recovering import recover
from ..run_folder import AuditFolder, RunFolder
from ..runner import evaluate_saved, steps_of, train
from ..sweeps.trial_runs import continued
from ..tasks.base import evaluate
from .arms import Arm, Setting
from .cells import Cell, folder_before, seed_of
from .peft_adalora import train_adalora

BLOCKS = 40
"""Into which the report split is divided, to tell how much a metric owes to its examples."""

CUT_NAME = "cut"
_LAST = 0.25  # share of the steps that an adapter is trained on after it was cut


@dataclass(frozen=True)
class Audit:
    """What all workers of an audit share. ``storage`` is named as records name it; ``alerts`` are known beforehand."""

    setting: Setting
    arms: Sequence[Arm]
    folder: AuditFolder
    storage: str
    command: str | None
    alerts: Sequence[str] = ()

    @property
    def config(self) -> RunConfig:
        """The audited configuration."""
        return self.setting.config


@dataclass(frozen=True)
class _Adapter:
    """What a run has made: how it is evaluated on a split, its ranks, its size at the end and the largest while
    training, and the optimizer steps it took."""

    judge: Callable[[str], EvaluationRecord]
    ranks: dict[str, int]
    params: int
    peak_params: int
    steps: int


def attrs_of(
    audit: Audit, cell: Cell, rate: float, stop: Callable[[], bool], callbacks: Sequence[TrainerCallback] = (),
    folder: str | None = None,
) -> dict[str, Any]:
    """Make one run, or go on with it; its attributes as the study keeps them. ``folder`` is the name of its folder.

    ``value`` is the task's metric on the tune split while an arm is tuned, and on the report split afterwards.

    Raises:
        Preempted: ``stop`` ended it.
        RankallocError: the run is at fault, or its training diverged.
    """
    setting, arm = audit.setting, audit.arms[cell.arm]
    run = arm.configured(setting, rate, seed_of(setting.config, cell))
    place = audit.folder.run(arm.name, folder or folder_before(cell))
    before = time.perf_counter()
    made = _WAYS[arm.way](audit, run, place, stop, callbacks)
    found: dict[str, Any] = {
        "rate": rate, "seed": run.seed, "params": made.params, "peak_params": made.peak_params, "steps": made.steps,
        "ranks": [made.ranks.get(shape.name, 0) for shape in setting.shapes],
    }
    metric = setting.prepared.metric
    tune = made.judge("tune")
    found["tune"] = found["value"] = _finite(tune, metric)
    if cell.phase == "seed":
        report = made.judge("report")
        found |= {"value": _finite(report, metric), "loss": report.metrics["loss"], "blocks": report.metric_blocks,
                  "examples": report.examples}
    return found | {"seconds": time.perf_counter() - before}


def _finite(record: EvaluationRecord, metric: str) -> float:
    value = record.metrics.get(metric)
    if value is None or value != value or value in (float("inf"), float("-inf")):
        raise RankallocError(f"training diverged: {metric} on the {record.split} split is {value}")
    return value


def _trained(
    audit: Audit, run: RunConfig, place: RunFolder, stop: Callable[[], bool], callbacks: Sequence[TrainerCallback]
) -> _Adapter:
    trace = continued(run, place, functools.partial(
        train, run, place.path, prepared=audit.setting.prepared, splits=(), stop=stop, callbacks=callbacks,
        group=audit.config.name,
    ))  # fmt: skip
    ranks = dict(zip((layer.name for layer in trace.layers), trace.final_ranks, strict=True))
    return _Adapter(
        functools.partial(_of_file, audit, run, place.adapter), ranks, _params(audit, ranks),
        trace.adapter_params_initial, trace.steps_done,
    )


def _cut(
    audit: Audit, run: RunConfig, place: RunFolder, stop: Callable[[], bool], callbacks: Sequence[TrainerCallback]
) -> _Adapter:
    """Post (LoRA-Squeeze, arXiv 2602.10993), with the cut that is best over all layers together (PARA,
    arXiv 2604.27796) in the place of one that is alike in each."""
    whole = _trained(audit, run, place, stop, callbacks)
    folder = place.path / CUT_NAME
    ranks = shrink(place.adapter, RankBudget(params=audit.setting.params), folder).ranks
    return _Adapter(
        functools.partial(_of_file, audit, run, folder), ranks, _params(audit, ranks), whole.peak_params, whole.steps
    )


def _cut_and_trained_on(
    audit: Audit, run: RunConfig, place: RunFolder, stop: Callable[[], bool], callbacks: Sequence[TrainerCallback]
) -> _Adapter:
    """Cont (LoRA-Squeeze): the same, and the last steps are trained at the ranks that are left."""
    steps = steps_of(run, audit.setting.prepared.train_examples or 0)
    last = max(1, int(_LAST * steps))
    first = run.replaced({"training.steps": max(1, steps - last), "training.epochs": None})
    cut = _cut(audit, first, place, stop, callbacks)
    folder = place.path / CUT_NAME
    recover(folder, run, last, folder, prepared=audit.setting.prepared)
    return _Adapter(
        functools.partial(_of_file, audit, run, folder), cut.ranks, cut.params, cut.peak_params, cut.steps + last
    )


def _peft(
    audit: Audit, run: RunConfig, place: RunFolder, stop: Callable[[], bool], callbacks: Sequence[TrainerCallback]
) -> _Adapter:
    made = train_adalora(audit.setting, run, place.path, list(callbacks))

    def judge(split: str) -> EvaluationRecord:
        return evaluate(audit.setting.prepared, made.model, split, run.training.eval_batch_size, BLOCKS)

    return _Adapter(judge, made.ranks, _params(audit, made.ranks), audit.setting.peak, made.steps)


_WAYS: dict[str, Callable[..., _Adapter]] = {
    "trained": _trained, "cut": _cut, "cut and trained on": _cut_and_trained_on, "peft": _peft,
}


def _of_file(audit: Audit, run: RunConfig, adapter: Path, split: str) -> EvaluationRecord:
    return evaluate_saved(run, audit.setting.prepared, adapter, split, BLOCKS)


def _params(audit: Audit, ranks: dict[str, int]) -> int:
    return sum(shape.params_per_rank * ranks.get(shape.name, 0) for shape in audit.setting.shapes)
