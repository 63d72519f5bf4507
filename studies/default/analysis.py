"""From finished runs to the findings: chosen rates, paired differences, tables and sentences.

A difference above zero is always the better one. With n paired seeds the sign-flip test has 2ⁿ outcomes: five seeds
cannot give a p-value below 1/16 however large the difference, so the interval says more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rankalloc.errors import RankallocError
from rankalloc.experiments.paired import paired_difference

from ..common import grid
from ..common.table import interval, markdown, p_text
from .arms import arm_of

REFERENCE = "uniform"
Run = dict


@dataclass(frozen=True)
class Comparison:
    """An arm beside another at one task and budget, over paired seeds on the report split. ``mean`` is the arm's
    own; ``difference`` its advantage, in the measure's unit."""

    task: str
    budget: int
    arm: str
    against: str
    measure: str
    seeds: int
    mean: float
    difference: float
    low: float
    high: float
    p_value: float

    @property
    def covers_zero(self) -> bool:
        return self.low <= 0 <= self.high


def tune_losses(runs: Iterable[Run], task: str, budget: int, arm: str, seeds: int) -> dict[float, float]:
    """{rate: mean tuning loss} of the rates at which ``seeds`` runs of phase "rates" have finished."""
    mine = [r for r in runs if (r["phase"], r["task"], r["budget"], r["arm"]) == ("rates", task, budget, arm)]
    return grid.mean_losses(((r["rate"], r["tune"]["loss"] if "tune" in r else math.inf) for r in mine), seeds)


def chosen_rate(runs: Sequence[Run], task: str, budget: int, arm: str, seeds: int) -> float | None:
    """The rate ``arm`` is judged at: its own best one, or that of the arm it shares its rate with."""
    return grid.best_rate(tune_losses(runs, task, budget, str(arm_of(arm).rates_of), seeds))


def compare(runs: Sequence[Run], measure: str, rate_seeds: int) -> list[Comparison]:
    """Every arm beside uniform LoRA and beside its own twin, where at least two seeds are paired.

    Args:
        runs: records of both phases, of one setting.
        measure: "metric" for the task's own, or "loss".

    Raises:
        RankallocError: the runs of one task saw different data.
    """
    _check_data(runs)
    values: dict[tuple[str, int, str], dict[int, float]] = {}
    for run in runs:
        if run["phase"] != "seeds" or "report" not in run:
            continue
        cell = (run["task"], run["budget"], run["arm"])
        if run["rate"] == chosen_rate(runs, *cell, rate_seeds):
            name = run["metric"] if measure == "metric" else measure
            values.setdefault(cell, {})[run["seed"]] = run["report"][name]
    metrics = {run["task"]: (run["metric"], run["direction"]) for run in runs}
    found = []
    for (task, budget, arm), own in sorted(values.items()):
        name, direction = metrics[task] if measure == "metric" else (measure, "minimize")
        sign = -1.0 if direction == "minimize" else 1.0
        twin = arm_of(arm).twin
        for against in dict.fromkeys([REFERENCE, *([str(twin)] if twin else [])]):
            other = values.get((task, budget, against), {})
            seeds = sorted(own.keys() & other.keys())
            if arm == against or len(seeds) < 2:
                continue
            pair = [sign * own[seed] for seed in seeds], [sign * other[seed] for seed in seeds]
            mean = statistics.fmean(own[seed] for seed in seeds)
            found.append(Comparison(task, budget, arm, against, name, len(seeds), mean, **paired_difference(*pair)))
    return found


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """All comparisons as Markdown."""
    header = ("task", "rank", "arm", "against", "measure", "seeds", "mean", "advantage", "95 % interval", "p")
    return markdown(header, [
        (c.task, str(c.budget), c.arm, c.against, c.measure, str(c.seeds), f"{c.mean:.4f}",
         f"{c.difference:+.4f}", interval(c.low, c.high), p_text(c.p_value))
        for c in comparisons
    ])  # fmt: skip


def run_table(runs: Sequence[Run], rate_seeds: int) -> str:
    """How each arm was trained and what it cost, as Markdown: rates, parameters, seconds and memory."""
    header = ("task", "rank", "arm", "rate", "rates tried", "peak parameters", "final parameters", "seconds a run",
              "peak memory")  # fmt: skip
    rows = []
    for task, budget, arm in sorted({(run["task"], run["budget"], run["arm"]) for run in runs}):
        mine = [r for r in runs if (r["task"], r["budget"], r["arm"]) == (task, budget, arm) and "final_params" in r]
        tried = sorted(tune_losses(runs, task, budget, str(arm_of(arm).rates_of), rate_seeds))
        rate = chosen_rate(runs, task, budget, arm, rate_seeds)
        if not mine or rate is None:
            continue
        edge = " (edge)" if rate in (tried[0], tried[-1]) else ""
        memory = [run["peak_memory_bytes"] for run in mine if run["peak_memory_bytes"]]
        rows.append((
            task, str(budget), arm, f"{rate:g}{edge}", ", ".join(f"{r:g}" for r in tried),
            f"{max(run['peak_params'] for run in mine):,}", f"{max(run['final_params'] for run in mine):,}",
            f"{statistics.median(run['seconds'] for run in mine):.0f}",
            f"{statistics.median(memory) / 2**20:,.0f} MiB" if memory else "–",
        ))  # fmt: skip
    return markdown(header, rows)


def sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """One plain sentence for each comparison."""
    found = []
    for c in comparisons:
        where = f"on {c.task} at mean rank {c.budget}"
        span = interval(c.low, c.high)
        if c.covers_zero:
            verdict = f"no difference in {c.measure} was shown, the interval covers zero ({span})"
        else:
            word = "better" if c.difference > 0 else "worse"
            verdict = f"{word} by {abs(c.difference):.4f} in {c.measure} (95 % interval {span}, p {p_text(c.p_value)})"
        found.append(f"{c.arm} against {c.against} {where}, {c.seeds} paired seeds: {verdict}.")
    return found


def missing_pairs(runs: Iterable[Run]) -> list[str]:
    """One sentence for each judged run that diverged: its pair is missing from the comparisons."""
    return [
        f"{run['arm']} on {run['task']} at mean rank {run['budget']}, rate {run['rate']:g}, seed {run['seed']} is "
        f"missing from its pairs: {run['message']}."
        for run in runs if run["phase"] == "seeds" and "message" in run
    ]  # fmt: skip


def _check_data(runs: Iterable[Run]) -> None:
    seen: dict[str, str] = {}
    for run in runs:
        if seen.setdefault(run["task"], run["data"]) != run["data"]:
            raise RankallocError(
                f"the runs of task {run['task']!r} saw different data; move results.json away and run them again"
            )
