"""The record of a run: what was asked, what was done, what came out.

:class:`RankTrace` is the one bridge between training and everything that looks at it afterwards
(reports, sweeps, tracking). It is plain data, validated by pydantic, stored as versioned JSON, and
independent of torch. Lists of per-layer values are in the order of :attr:`RankTrace.layers`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from .files import write_json
from .records import Record, finite, load_record

TRACE_VERSION: Final = 1
TRACE_NAME = "trace.json"
SWEEP_NAME = "sweep.json"
SWEEP_STUDY = "study.db"

RankChoice = Literal["adaptive", "uniform", "control", "given"]
GIVEN = ("manual", "module-types")
"""Methods whose ranks the user states: they look neither at data nor at the training."""

BASELINES = ("bottleneck",)
"""Methods that train something else than low-rank updates, for comparison."""


def rank_choice(method: str, options: Mapping[str, Any]) -> RankChoice:
    """How a run chose its ranks; ``options`` are its ``method_options``.

    - "uniform": the same rank for every layer, by the method of that name or by ``placement="uniform"``.
    - "control": any other placement than the method's own ("random", "shuffled", "grouped"). Such ranks differ between
      layers, but the method did not place them. So is a baseline that has no ranks (:data:`BASELINES`).
    - "given": ranks that the user stated before training (:data:`GIVEN`).
    - "adaptive": everything else, which includes every method a user adds, whatever its name.

    Only "adaptive" ranks are evidence for adaptive ranks, and only "uniform" ones are what they are compared with.
    """
    placement = options.get("placement", "chosen")
    if method in BASELINES:
        return "control"
    if "uniform" in (method, placement):
        return "uniform"
    if placement != "chosen":
        return "control"
    return "given" if method in GIVEN else "adaptive"


class LayerRecord(Record):
    """One adapted layer. ``block`` is its index in the stack (None for a layer outside any stack), ``role`` its
    name within the block (``attention.self.query``): the two axes of the rank map."""

    name: str
    kind: str
    block: int | None
    role: str
    d_in: int
    d_out: int
    initial_rank: int


class BudgetRecord(Record):
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


class AllocationRecord(Record):
    """One allocation: the budget asked and reached (in the budget's unit), the live rank of each layer, the lowest
    kept and the highest dropped score, and how many triplets were dropped or returned since the one before."""

    step: int
    asked: int
    reached: int
    ranks: list[int]
    lowest_kept: float | None = None
    highest_dropped: float | None = None
    dropped: int = 0
    returned: int = 0


class ScoreRecord(Record):
    """Scores at the last allocation: those kept and those dropped, per layer, each descending.

    ``left`` holds the triplets that earlier allocations removed from memory, with the score they had then.
    """

    score: str
    step: int
    kept: list[list[float]]
    dropped: list[list[float]]
    left: list[list[float]] = []


class StoredRecord(Record):
    """What the pairs of factors in the run's adapter file hold: ``numbers`` and their ``bytes``, and those of both that
    only pad ranks, at rank ``rank`` and in ``layout``, which ``reader`` asked for (empty: nobody)."""

    layout: str
    reader: str
    rank: int
    numbers: int
    padding: int
    bytes: int
    padding_bytes: int | None = None


class LogRecord(Record):
    """One point of the curves: the values the loop logged at ``step`` (loss, eval_loss, ...)."""

    step: int
    values: dict[str, float]


class EvaluationRecord(Record):
    """Quality on one split. ``example_losses`` allows paired intervals between runs; so does ``metric_blocks`` for a
    metric that is no mean over examples: the pseudo-values of the delete-a-block jackknife (Tukey 1958), whose spread
    tells how much the metric owes to the examples."""

    split: str
    examples: int
    metrics: dict[str, float]
    example_losses: list[float] | None = None
    metric_blocks: list[float] | None = None


class EnvironmentRecord(Record):
    python: str
    platform: str
    device: str
    threads: int
    versions: dict[str, str]
    git_hash: str | None = None
    kernel: str | None = None
    products: str | None = None
    processor: str | None = None


class RankTrace(Record):
    """The versioned record of one run. Sizes in parameters count the plain LoRA that ships (d_in + d_out a rank);
    ``*_bytes`` are bytes, ``*_seconds`` seconds. ``alerts`` should make a reader wary; ``notes`` say what was done."""

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
    trained_params_initial: int | None = None
    trained_params_final: int | None = None
    stored: StoredRecord | None = None
    allocator_state_bytes: int | None = None
    wall_seconds: float | None = None
    step_seconds_before_freeze: float | None = None
    step_seconds_after_freeze: float | None = None
    environment: EnvironmentRecord | None = None
    alerts: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    finished: bool = False

    @property
    def final_ranks(self) -> list[int]:
        """Live rank of each layer after the last allocation (the initial ones before any)."""
        if self.allocations:
            return list(self.allocations[-1].ranks)
        return [layer.initial_rank for layer in self.layers]

    @property
    def rank_choice(self) -> RankChoice:
        """How this run chose its ranks; see :func:`rank_choice`."""
        return rank_choice(self.method, self.method_options)

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
            RankallocError: the file is missing, is not JSON, has another version, or lacks a trace's
                fields.
        """
        return load_record(cls, path, "trace")


FRESH_SEED: Final = "fresh seed"
"""The role of a run that trains one of the best trials again, followed by the number of the seed."""


class TrialRecord(Record):
    """One trial of a sweep. ``trace`` is relative to the sweep's folder; ``role`` distinguishes the enqueued trials
    ("uniform control", "start", "earlier best", "matched control") from sampled ones. In a sweep with a ``placement``,
    ``params`` holds the trial's own. ``values`` are those of its seeds, whose mean ``value`` is; ``fresh`` those of
    seeds that it was not chosen by; ``over`` the limits that it exceeds; ``steps`` the optimizer steps it took."""

    number: int
    state: Literal["complete", "failed", "running", "pruned", "waiting"]
    role: str = "sampled"
    params: dict[str, Any] = Field(default_factory=dict)
    value: float | None = None
    values: list[float] = Field(default_factory=list)
    fresh: list[float] = Field(default_factory=list)
    over: list[str] = Field(default_factory=list)
    metrics: dict[str, float] = Field(default_factory=dict)
    ranks: int | None = None
    adapter_params: int | None = None
    stored_bytes: int | None = None
    steps: int | None = None
    seconds: float | None = None
    trace: str | None = None
    message: str | None = None


class PairRecord(Record):
    """The best adaptive trial and the best uniform one of at most its size, each evaluated once on the report
    split. ``difference`` is adaptive minus uniform in mean example loss (negative: adaptive is better), with a
    paired bootstrap 95 % interval over examples and the sign-flip permutation p-value."""

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


class ColumnRecord(Record):
    """The best trial at one budget of a sweep whose runs are shared: ``shared`` is its value on the tune split when its
    adapter is cut to ``budget`` (a share), ``direct`` that of a run trained at that budget; their difference is the
    error of sharing runs. ``steps`` are those of the direct run."""

    budget: float
    trial: int
    shared: float
    direct: float
    adapter_params: int
    steps: int = 0


class SweepRecord(Record):
    """A sweep at the time of writing: its space, trials, front and best trial. ``steps`` are the optimizer steps of all
    its runs, fresh seeds included."""

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
    column: list[ColumnRecord] = Field(default_factory=list)
    seconds: float | None = None
    steps: int | None = None

    def trial(self, number: int) -> TrialRecord:
        """The trial with this number. Raises KeyError when there is none."""
        for trial in self.trials:
            if trial.number == number:
                return trial
        raise KeyError(number)

    def rank_choice(self, trial: TrialRecord) -> RankChoice:
        """How this trial chose its ranks; see :func:`rank_choice`.

        The method and placement are the trial's own, else those of the sweep's configuration (0.1 recorded the
        placement there only); without any method, the role of a control decides.
        """
        method = trial.params.get("method")
        if method is None and trial.role in ("uniform control", "matched control"):
            return "uniform"
        options = self.config.get("method_options") or {}
        placement = trial.params.get("placement", options.get("placement", "chosen"))
        return rank_choice(str(method or self.config.get("method", "")), {"placement": placement})

    def save(self, path: str | os.PathLike) -> Path:
        """Write the record as JSON, whole or not at all."""
        return write_json(path, finite(self.model_dump(mode="json")))

    @classmethod
    def load(cls, path: str | os.PathLike) -> SweepRecord:
        """Read a sweep record; raises :class:`RankallocError` as :meth:`RankTrace.load` does."""
        return load_record(cls, path, "sweep record")
