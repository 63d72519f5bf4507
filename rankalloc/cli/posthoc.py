"""The work of ``shrink`` and ``frontier``, and what other commands on finished adapters share with them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, unknown
from .output import count, number, results_only, say, show, show_json, show_table, stored_text
from .progress import Bar

if TYPE_CHECKING:
    from ..budget import RankBudget
    from ..experiments.config import RunConfig
    from ..experiments.judging import TaskEvaluator
    from ..experiments.recovering import RecoveredEvaluator
    from ..posthoc.metric import KroneckerMetric
    from ..posthoc.results import CutResult


_FRACTIONS = "0.75,0.5,0.375,0.25,0.125"
_BATCHES = 32


@dataclass(frozen=True)
class BudgetOptions:
    """The budget options of a command."""

    ranks: int | None
    params: int | None
    bytes: int | None
    fraction: float | None
    min_rank: int
    max_rank: int | None
    multiple_of: int

    @property
    def given(self) -> bool:
        return any(value is not None for value in (self.ranks, self.params, self.bytes, self.fraction))

    def resolved(self) -> RankBudget:
        from ..budget import RankBudget

        if not self.given:
            raise ConfigError("give a budget: one of --ranks, --params, --bytes, --fraction")
        return RankBudget(**asdict(self))


@dataclass(frozen=True)
class Weighing:
    """The calibration options of a command. Without ``config`` layers are not weighed by data."""

    config: str | None
    inputs_only: bool
    batches: int | None

    def check(self, switch: str) -> None:
        """Raise ConfigError when calibration has options but was not asked for with ``switch``."""
        if self.config is None and (self.inputs_only or self.batches is not None):
            option = "--inputs-only" if self.inputs_only else "--batches"
            raise ConfigError(f"{option} is an option of calibration; give {switch} too, or leave it out")

    def metric(self, adapter: str, judge: TaskEvaluator | None) -> KroneckerMetric | None:
        if self.config is None:
            return None
        from ..posthoc.calibration import calibrate
        from ..storage.reading import FinishedAdapter

        judge = judge or evaluator(self.config)
        batches = self.batches or _BATCHES
        say(f"calibrating on {count(batches, 'batch', 'batches')}")
        folder = FinishedAdapter(adapter).folder
        with Bar() as bar:
            return calibrate(
                judge.model, folder, judge.batches(batches), inputs_only=self.inputs_only,
                progress=lambda done: bar(done, batches, {}),
            )


def run_shrink(
    adapter: str, output: str, budget: BudgetOptions, options: dict[str, Any], weighing: Weighing,
    max_drop: str | None, task: str | None, cut: str, recover: int | None, learning_rate: float | None, as_json: bool,
) -> None:
    """``rankalloc shrink``; ``options`` say how the folder is laid out."""
    judged_by = task or weighing.config
    if max_drop is None and recover is None and task:
        raise ConfigError("--task is for --max-drop and --recover; give one of them too, or leave it out")
    _check_rate(recover, learning_rate)
    if recover is not None and judged_by is None:
        raise ConfigError("--recover needs a task to train on: --task CONFIG, such as the run's own config.yaml")
    on = None if recover is None or judged_by is None else configured(judged_by)  # its mistakes before the cut
    if max_drop is not None:
        if budget.given:
            raise ConfigError("--max-drop finds the budget itself; leave out --ranks, --params, --bytes and --fraction")
        if judged_by is None:
            raise ConfigError("--max-drop needs a task to evaluate on: --task CONFIG, or --calibrate CONFIG")
        if cut != "svd":
            raise ConfigError("--max-drop cuts by singular triplets; give a budget with --cut nested, or leave it out")
    weighing.check("--calibrate CONFIG")
    if max_drop is None or judged_by is None:
        result = _shrink_to_budget(adapter, output, budget.resolved(), weighing, cut, options)
    else:
        result = _shrink_by_quality(adapter, output, share(max_drop), weighing, judged_by, options)
    if on is not None and recover is not None:
        _recover(result, output, on, recover, learning_rate, options)
    show_cut(result, output, as_json)


def _check_rate(recover: int | None, learning_rate: float | None) -> None:
    if recover is None and learning_rate is not None:
        raise ConfigError("--learning-rate is that of --recover; give --recover STEPS too, or leave it out")


def _recover(
    result: CutResult, output: str, config: RunConfig, steps: int, rate: float | None, options: dict[str, Any]
) -> None:
    """Train the cut adapter on, in its folder; the record says so."""
    say(f"training on for {count(steps, 'step')} at the ranks that are left")
    with results_only(), Bar() as bar:
        from ..experiments.recovering import recover
        from ..posthoc.shrinking import RECORD_NAME
        from ..storage.quiet import quiet

        with quiet():
            done = recover(output, config, steps, output, learning_rate=rate, progress=bar, **options)
        result.extra["recovered"] = done.record()
        result.save(Path(output) / RECORD_NAME)


def _shrink_to_budget(
    adapter: str, output: str, budget: RankBudget, weighing: Weighing, cut: str, options: dict[str, Any]
) -> CutResult:
    with results_only(), Bar() as bar:
        from ..posthoc.shrinking import shrink

        _check_cut(adapter, output, cut, weighing)
        metric = weighing.metric(adapter, None)
        return shrink(adapter, budget, output, cut=cut, metric=metric, progress=bar, **options)


def _shrink_by_quality(
    adapter: str, output: str, drop: float, weighing: Weighing, task: str, options: dict[str, Any]
) -> CutResult:
    with results_only(), Bar() as bar:
        from ..posthoc.smallest import smallest

        _check_cut(adapter, output, "svd", weighing)
        judge = evaluator(task)
        metric = weighing.metric(adapter, judge if task == weighing.config else None)
        return smallest(
            adapter, Reported(judge), drop, output, higher_is_better=judge.higher_is_better, metric=metric,
            progress=bar, **options,
        )


def _check_cut(adapter: str, output: str, cut: str, weighing: Weighing) -> None:
    """Refuse what does not fit before a model is built."""
    from ..posthoc.nested_cut import cut_of, require_no_metric
    from ..posthoc.shrinking import open_adapter

    require_no_metric(cut_of(open_adapter(adapter, output), cut), weighing.config)


def run_frontier(
    adapter: str, output: str, task: str, fractions: str | None, split: str, weighing: Weighing, cut: str | None,
    recover: int | None, learning_rate: float | None, as_json: bool,
) -> None:
    """``rankalloc frontier``."""
    weighing.check("--calibrated")
    _check_rate(recover, learning_rate)
    if split not in ("tune", "report"):
        raise ConfigError(unknown("split", split, ("tune", "report")))
    shares = numbers("--fractions", fractions or _FRACTIONS)
    if not all(0 < value < 1 for value in shares):
        raise ConfigError(f"--fractions are shares between 0 and 1, got {fractions!r}")
    with results_only(), Bar() as bar:
        from ..budget import RankBudget
        from ..posthoc.frontier import frontier
        from ..posthoc.nested_cut import cut_of, require_no_metric
        from ..storage.reading import FinishedAdapter

        finished = FinishedAdapter(adapter)
        cut = cut_of(finished, cut)
        require_no_metric(cut, weighing.config)
        total = sum(
            finished.factors(name).rank * (layer.d_in + layer.d_out) for name, layer in finished.layers.items()
        )
        judge = evaluator(task, split)
        recovered = None
        if recover is not None:
            from ..experiments.recovering import RecoveredEvaluator

            recovered = RecoveredEvaluator(judge, configured(task), recover, finished.folder, learning_rate)
        every = cut == "nested" and fractions is None
        curve = frontier(
            finished, None if every else [RankBudget(params=int(value * total)) for value in shares],
            Reported(judge, recovered), output, higher_is_better=judge.higher_is_better, name=judge.task.metric,
            metric=weighing.metric(adapter, judge), cut=cut, recovered=recover or 0, progress=bar,
        )
    if as_json:
        return show_json({**curve.to_dict(), "folder": output})
    show_table(
        [(f"{p.params:,}", f"{p.params / total:.1%}", f"{p.ranks:,}", f"{p.error:.3f}", number(p.value),
          "knee" if p is curve.knee else "") for p in curve.points],
        ("parameters", "share", "ranks", "error", curve.name, ""), right=range(5),
    )
    if curve.aurac is not None:
        show(f"AURAC {number(curve.aurac)}: the mean over log2 of the parameters, for curves over the same budgets")
    show(f"wrote {os.path.join(output, 'frontier.svg')}")


def evaluator(config: str, split: str = "tune") -> TaskEvaluator:
    """An evaluator for a named task, or that of a YAML file, with its model."""
    loaded = configured(config)  # before heavy imports, so that a mistake is reported at once
    from transformers import set_seed

    from ..experiments.judging import TaskEvaluator
    from ..experiments.tasks import prepare
    from ..storage.quiet import quiet

    with quiet():
        set_seed(loaded.seed)
        return TaskEvaluator(prepare(loaded), split, loaded.training.batch_size)


def configured(config: str) -> RunConfig:
    """The configuration of a named task, or that of a YAML file."""
    from ..experiments.config import load_config
    from ..experiments.task_names import TASKS

    if config in TASKS:
        return load_config(None, [f"task={config}"])
    if not os.path.exists(config) and not config.endswith((".yaml", ".yml")):
        raise ConfigError(unknown("task", config, TASKS) + "; or a YAML file")
    return load_config(config)


class Reported:
    """An evaluator that prints each result on stderr: evaluations take a while."""

    def __init__(self, judge: TaskEvaluator, recovered: RecoveredEvaluator | None = None) -> None:
        self.evaluate, self.name = recovered or judge, judge.task.metric
        self.fingerprint = self.evaluate.fingerprint

    def __call__(self, folder: Path) -> float:
        value = self.evaluate(folder)
        say(f"{self.name} {number(value)}")
        return value


def share(text: str) -> float:
    """``0.5%`` or ``0.005`` as a number. ConfigError for anything else."""
    try:
        return float(text.rstrip("% ")) / (100 if text.rstrip().endswith("%") else 1)
    except ValueError:
        raise ConfigError(f"--max-drop takes a share such as 0.5% or 0.005, got {text!r}") from None


def numbers(option: str, text: str) -> list[float]:
    """Numbers between commas. ConfigError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} takes numbers between commas, such as 0.7,0.3, got {text!r}") from None


def show_cut(result: CutResult, output: str, as_json: bool) -> None:
    """Print what a cut kept, in all and by layer."""
    if as_json:
        return show_json({**result.to_dict(), "path": output})
    before = result.params_before
    rows = [
        ("budget", f"{result.asked:,} {result.unit} asked, {result.spent:,} spent"),
        ("parameters", f"{result.params:,} of {before:,} ({result.params / before if before else 1:.1%})"),
        ("error", f"{result.error:.4g} of ‖ΔW‖"),
    ]
    if result.metric != "frobenius":
        rows.append(("weighed error", f"{result.metric_error:.4g}, by {result.metric}"))
    if result.gap > 0:
        rows.append(("bound", f"no choice within the budget lowers the squared error by more than {result.gap:.2g}"))
    if (recovered := result.extra.get("recovered")) is not None:
        rows.append(("trained on", f"{count(recovered['steps'], 'step')} from rate {recovered['learning_rate']:g}"))
        rows += [
            (when, "  ".join(f"{name} {number(value)}" for name, value in recovered[when].items()) + "  (tune)")
            for when in ("before", "after")
        ]
    held = result.stored
    if held.padding:
        rows.append(("in the file", stored_text(result.params, held.numbers, held.padding_bytes, held.reader)))
    show_table([*rows, ("adapter", output)])
    show()
    show_table(
        [(c.name, c.rank_before, c.rank, f"{c.relative_error:.4f}") for c in result.layers],
        ("layer", "rank", "kept", "error"), right=(1, 2, 3),
    )
