"""Training on after an adapter was cut: a few steps at the ranks that it has, on the task that it was made for.

LoRA-Squeeze (arXiv 2602.10993) calls it Cont: train at a high rank, cut by SVD, and let the cut adapter settle. Ranks
do not change any more, so the size stays that of the cut.

Cost: the steps, and two evaluations. Weakness: the rate is a share of the run's own, and no search for the best one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

from ..errors import ConfigError
from ..files import sha256_of
from ..options import integer, number
from ..storage.folder import require_destination
from ..storage.loading import load
from ..storage.quiet import quiet
from ..storage.readers import layout_for
from ..storage.reading import FinishedAdapter
from ..storage.saving import require_reader, save
from .config import RunConfig
from .judging import TaskEvaluator
from .tasks import prepare
from .tasks.base import PreparedTask, base_of, evaluate
from .trainer import arguments_for, require_trainable, trainer_for

SHARE_OF_RATE = 0.25
"""Of the run's own learning rate, where none is given: the adapter has been trained, and is not to be forgotten."""


@dataclass(frozen=True)
class Recovery:
    """What :func:`recover` did: its steps and first learning rate (cosine to zero), and the metrics on the tune split
    before and after."""

    steps: int
    learning_rate: float
    seed: int
    before: dict[str, float]
    after: dict[str, float]

    def record(self) -> dict[str, Any]:
        """The record as plain values for JSON."""
        return asdict(self)


def recover(
    adapter: str | os.PathLike,
    config: RunConfig,
    steps: int,
    out: str | os.PathLike,
    *,
    learning_rate: float | None = None,
    layout: str | None = None,
    pad_multiple: int = 1,
    reader: str | None = None,
    prepared: PreparedTask | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Recovery:
    """Train a finished adapter on for ``steps`` optimizer steps, at the ranks that it has.

    Args:
        adapter: a folder, such as one that :func:`rankalloc.shrink` wrote.
        config: of the run that made it, or of another on the same base: task, model, batch size and seed are its own.
        steps: optimizer steps; a tenth of those it was trained for is a good beginning.
        out: folder to write; ``adapter`` itself is allowed, and replaced at the end.
        learning_rate: the first; it falls to zero along a cosine. None for a quarter of the configuration's.
        layout, pad_multiple, reader: as for :func:`rankalloc.save`.
        prepared: the task, when the caller has it already.
        progress: called after every step with (step, steps, {}).

    Raises:
        ConfigError: a number is out of its range; there is no such layout or reader, or the reader cannot take the
            adapter; the task's trainer cannot begin with an adapter that has moved (DPO).
        AdapterFileError: the adapter is damaged, or of another base.
        RankallocError: ``out`` cannot be written; nothing is changed then.
    """
    written = layout_for(layout, pad_multiple, reader)
    steps, rate = _settings(config, steps, learning_rate)
    if Path(adapter).resolve() != Path(out).resolve():
        require_destination(out)
    FinishedAdapter(adapter)  # its own faults come before the data are read
    config = config.replaced({
        "training.steps": steps, "training.epochs": None, "training.learning_rate": rate,
        "training.scheduler": "cosine", "training.warmup_steps": 0, "training.save_every": None,
    })
    prepared = prepared or prepare(config)
    _require_recoverable(prepared)
    set_seed(config.seed)
    model = base_of(prepared)
    adapters = load(model, adapter)
    require_trainable(prepared, model, adapters)
    require_reader(adapters, written)
    size = config.training.eval_batch_size
    before = evaluate(prepared, model, "tune", size).metrics
    with tempfile.TemporaryDirectory() as folder:  # the Trainer wants one, and keeps nothing in it
        arguments = arguments_for(config, prepared, Path(folder))
        callbacks: list[TrainerCallback] = [] if progress is None else [_Told(progress)]
        with trainer_for(config, model, adapters, prepared, arguments, callbacks) as trainer:
            trainer.train()
    after = evaluate(prepared, model, "tune", size).metrics
    save(adapters, out, layout, pad_multiple=pad_multiple, reader=reader)
    return Recovery(steps, rate, config.seed, before, after)


def _settings(config: RunConfig, steps: int, learning_rate: float | None) -> tuple[int, float]:
    """The steps and the first learning rate."""
    if learning_rate is None:
        learning_rate = SHARE_OF_RATE * config.training.learning_rate
    return integer("steps", steps, 1), number("learning_rate", learning_rate, 0, ends=False)


def _require_recoverable(prepared: PreparedTask) -> None:
    if prepared.trainer == "dpo":
        raise ConfigError("DPO compares with the base, and a finished adapter is not the base: it cannot be trained on")


class RecoveredEvaluator:
    """``evaluate(folder)`` for :func:`rankalloc.frontier`: trains a cut adapter on, as :func:`recover` does with these
    arguments, in its folder, and judges what comes of it. ``whole``, the folder of which the cuts are, is judged as it
    is. Raises ConfigError, as :func:`recover` does, before anything is evaluated."""

    def __init__(
        self, judge: TaskEvaluator, config: RunConfig, steps: int, whole: Path, learning_rate: float | None = None
    ) -> None:
        _require_recoverable(judge.task)
        self.judge, self.config, self.whole = judge, config, whole.resolve()
        self.steps, self.rate = _settings(config, steps, learning_rate)
        self.fingerprint = sha256_of(judge.fingerprint, config.to_yaml(), f"{self.steps} {self.rate}")

    def __call__(self, folder: Path) -> float:
        if folder.resolve() != self.whole:
            with quiet():
                recover(folder, self.config, self.steps, folder, learning_rate=self.rate, prepared=self.judge.task)
        return self.judge(folder)


class _Told(TrainerCallback):
    def __init__(self, progress: Callable[[int, int, dict[str, float]], None]) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps, {})
