"""The record of a run: what was asked, what was done, what came out.

:class:`RankTrace` is the one bridge between training and everything that looks at it afterwards
(reports, sweeps, tracking). It is plain data, validated by pydantic, stored as versioned JSON, and
knows nothing of torch. Lists that speak of layers are in the order of :attr:`RankTrace.layers`.
"""

from __future__ import annotations

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import RankallocError
from .files import write_json

TRACE_VERSION = 1
TRACE_NAME = "trace.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class LayerRecord(_Record):
    """One adapted layer. ``block`` is its index in the stack (None outside one), ``role`` its name
    within the block (``attention.self.query``): the two axes of the rank map."""

    name: str
    kind: str
    block: int | None
    role: str
    d_in: int
    d_out: int
    initial_rank: int


class BudgetRecord(_Record):
    """The budget as given and as resolved for these layers. All steps are optimizer steps."""

    given: dict[str, Any]
    unit: Literal["ranks", "params", "bytes"]
    target: int
    initial: int
    min_rank: int
    max_rank: int | None
    multiple_of: int
    shape: str
    total_steps: int
    warmup_steps: int
    freeze_step: int
    allocate_every: int


class AllocationRecord(_Record):
    """One allocation: budget asked and reached (in ``unit``), live rank of each layer, the lowest
    kept and the highest dropped score, and how many triplets changed sides since the last one."""

    step: int
    asked: int
    reached: int
    ranks: list[int]
    lowest_kept: float | None = None
    highest_dropped: float | None = None
    dropped: int = 0
    returned: int = 0


class ScoreRecord(_Record):
    """Scores at the last allocation: per layer those kept and those dropped, each descending.

    ``left`` are those that earlier allocations took out of memory, with the score they had then.
    """

    score: str
    step: int
    kept: list[list[float]]
    dropped: list[list[float]]
    left: list[list[float]] = []


class LogRecord(_Record):
    """One point of the curves: whatever the loop logged at ``step`` (loss, eval_loss, ...)."""

    step: int
    values: dict[str, float]


class EvaluationRecord(_Record):
    """Quality on one split. ``example_losses`` allows paired intervals between runs."""

    split: str
    examples: int
    metrics: dict[str, float]
    example_losses: list[float] | None = None


class EnvironmentRecord(_Record):
    python: str
    platform: str
    device: str
    threads: int
    versions: dict[str, str]
    git_hash: str | None = None
    kernel: str | None = None
    products: str | None = None
    processor: str | None = None


class RankTrace(_Record):
    """The versioned record of one run; see the module docstring. Sizes in parameters count the
    plain LoRA that ships (d_in + d_out a rank), ``*_bytes`` are bytes, ``*_seconds`` seconds."""

    version: Literal[1] = TRACE_VERSION
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    name: str = "run"
    method: str
    method_options: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    model: str | None = None
    command: str | None = None
    data_fingerprint: str | None = None
    seed: int | None = None
    alpha: float
    rank: int
    scaling: float
    layers: list[LayerRecord]
    heads: dict[str, int] = Field(default_factory=dict)
    budget: BudgetRecord
    allocations: list[AllocationRecord] = Field(default_factory=list)
    scores: ScoreRecord | None = None
    singular_values: list[list[float]] | None = None
    logs: list[LogRecord] = Field(default_factory=list)
    evaluations: list[EvaluationRecord] = Field(default_factory=list)
    steps_done: int = 0
    nonfinite_steps: list[int] = Field(default_factory=list)
    adapter_params_initial: int = 0
    adapter_params_final: int | None = None
    allocator_state_bytes: int | None = None
    wall_seconds: float | None = None
    step_seconds_before_freeze: float | None = None
    step_seconds_after_freeze: float | None = None
    environment: EnvironmentRecord | None = None
    alerts: list[str] = Field(default_factory=list)
    finished: bool = False

    @property
    def final_ranks(self) -> list[int]:
        """Live rank of each layer after the last allocation (the initial ones before any)."""
        if self.allocations:
            return list(self.allocations[-1].ranks)
        return [layer.initial_rank for layer in self.layers]

    def evaluation(self, split: str) -> EvaluationRecord | None:
        """The last evaluation on ``split``, or None."""
        return next((e for e in reversed(self.evaluations) if e.split == split), None)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the trace as JSON, whole or not at all. Non-finite numbers become null or are left out."""
        return write_json(path, finite(self.model_dump(mode="json")))

    @classmethod
    def load(cls, path: str | os.PathLike) -> RankTrace:
        """Read a trace.

        Raises:
            RankallocError: the file is missing, is no JSON, is of a newer version, or does not
                have a trace's fields.
        """
        return load_record(cls, path, "trace", TRACE_VERSION)


class TrialRecord(_Record):
    """One trial of a sweep. ``trace`` is relative to the sweep's folder; ``role`` tells the
    enqueued trials ("uniform control", "start", "matched control") from sampled ones."""

    number: int
    state: Literal["complete", "failed", "running", "pruned", "waiting"]
    role: str = "sampled"
    params: dict[str, Any] = Field(default_factory=dict)
    value: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    ranks: int | None = None
    adapter_params: int | None = None
    seconds: float | None = None
    trace: str | None = None
    message: str | None = None


class PairRecord(_Record):
    """The best adaptive trial beside the best uniform one of at most its size, both evaluated
    once on the report split. ``difference`` is adaptive minus uniform in mean example loss
    (negative: adaptive is better), with a paired bootstrap 95 % interval over examples and the
    sign-flip permutation p-value."""

    adaptive: int
    uniform: int
    metric: str
    adaptive_metrics: dict[str, float]
    uniform_metrics: dict[str, float]
    difference: float
    low: float
    high: float
    p_value: float
    examples: int


class SweepRecord(_Record):
    """A sweep as it stood when it was written: its space, trials, front and best trial."""

    version: Literal[1] = 1
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    name: str
    task: str
    metric: str
    direction: Literal["minimize", "maximize"]
    space: dict[str, Any]
    storage: str
    command: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    trials: list[TrialRecord]
    best: int | None = None
    front: list[int] = Field(default_factory=list)
    importances: dict[str, float] = Field(default_factory=dict)
    pair: PairRecord | None = None
    seconds: float | None = None

    def trial(self, number: int) -> TrialRecord:
        """The trial with this number. Raises KeyError when there is none."""
        for trial in self.trials:
            if trial.number == number:
                return trial
        raise KeyError(number)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the record as JSON, whole or not at all."""
        return write_json(path, finite(self.model_dump(mode="json")))

    @classmethod
    def load(cls, path: str | os.PathLike) -> SweepRecord:
        """Read a sweep record; raises :class:`RankallocError` as :meth:`RankTrace.load` does."""
        return load_record(cls, path, "sweep record", 1)


SWEEP_NAME = "sweep.json"


def finite(value: Any) -> Any:
    """``value`` with every non-finite float replaced by None in objects and left out of dicts of
    numbers: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items() if not (isinstance(v, float) and not math.isfinite(v))}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def load_record(cls: type[BaseModel], path: str | os.PathLike, what: str, version: int) -> Any:
    """Parse ``path`` into ``cls`` with one clear sentence for each way that can go wrong."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RankallocError(f"no {what} at {path}; give the folder a run wrote to, or its {path.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RankallocError(f"could not read {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise RankallocError(
            f"{path} is no JSON (line {error.lineno}); it may be damaged or no {what} at all"
        ) from None
    if not isinstance(data, dict):
        raise RankallocError(f"{path} is no {what}: it holds a {type(data).__name__}, not an object")
    if data.get("version") != version:
        raise RankallocError(
            f"{path} is a {what} of version {data.get('version')!r}, and this rankalloc reads version {version}"
        )
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RankallocError(f"{path} is no valid {what}: {where}: {first['msg']}") from None
