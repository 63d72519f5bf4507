"""From finished runs to the findings: every arm beside LoRA tuned at each budget, and the area under each curve.

Differences are in the task's metric, the arm's minus uniform LoRA's. An arm is level at a budget where the 90 % t
interval over paired seeds lies within the margin: two one-sided tests at 5 % (Schuirmann, 1987).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from scipy import stats

from ..common import grid
from ..common.paired import t_interval
from ..common.table import markdown
from .arms import ARMS, CUT, RANKS, RECOVERED, RECOVERING, TASKS, UNIFORM, further_steps, ranks_of

MARGIN = 0.002
"""Of the metric: 0.2 points."""


class Row(NamedTuple):
    """A line at one budget: its mean, and beside uniform LoRA the paired difference with its 90 % interval."""

    task: str
    line: str
    rank: int
    seeds: int
    loss: float
    metric: float
    difference: float
    low: float
    high: float

    @property
    def level(self) -> bool:
        return self.low > -MARGIN and self.high < MARGIN

    @property
    def no_worse(self) -> bool:
        return self.low > -MARGIN


class Area(NamedTuple):
    """The area under a line (AURAC, arXiv 2605.07850: the mean metric over log₂ of the rank), beside uniform LoRA's
    with the 95 % interval of the difference, and the optimizer steps of tuning and one seed."""

    task: str
    line: str
    area: float
    difference: float
    low: float
    high: float
    steps: int


def lines() -> Iterator[tuple[str, str, str]]:
    """(name of the line, arm, kind of cut)."""
    for arm in ARMS:
        yield arm, arm, CUT
        if arm in RECOVERING:
            yield f"{arm}, {RECOVERED}", arm, RECOVERED


def tune_losses(runs: Sequence[dict], task: str, arm: str, rank: int) -> dict[float, float]:
    """{rate: mean loss on the tune split over the budgets of the run}, infinite where training diverged."""
    mine = [r for r in runs if (r["phase"], r["task"], r["arm"], r["rank"]) == ("rates", task, arm, rank)]
    tried = ((r["rate"], statistics.fmean(o["loss"] for o in r[CUT].values()) if CUT in r else math.inf) for r in mine)
    return grid.mean_losses(tried, 1)


def _values(runs: Sequence[dict], task: str, arm: str, kind: str) -> dict[int, dict[int, dict]]:
    """{rank of the budget: {seed: loss and metric}} of the runs that judge, at the chosen rates."""
    found: dict[int, dict[int, dict]] = {}
    for rank in ranks_of(arm):
        rate = grid.best_rate(tune_losses(runs, task, arm, rank))
        for run in runs:
            cell = (run["phase"], run["task"], run["arm"], run["rank"], run["rate"])
            if cell == ("seeds", task, arm, rank, rate):
                for budget, one in run.get(kind, {}).items():
                    found.setdefault(int(budget), {})[run["seed"]] = one
    return found


def rows_of(runs: Sequence[dict]) -> list[Row]:
    """Every line at every budget at which it shares two seeds with uniform LoRA."""
    found = []
    for task in TASKS:
        uniform = _values(runs, task, UNIFORM, CUT)
        for name, arm, kind in lines():
            for rank, own in sorted(_values(runs, task, arm, kind).items()):
                seeds = sorted(own.keys() & uniform.get(rank, {}).keys())
                if len(seeds) < 2:
                    continue
                mean, low, high = _interval([own[s]["metric"] - uniform[rank][s]["metric"] for s in seeds], 0.90)
                found.append(Row(
                    task, name, rank, len(seeds), statistics.fmean(own[s]["loss"] for s in seeds),
                    statistics.fmean(own[s]["metric"] for s in seeds), mean, low, high,
                ))  # fmt: skip
    return found


def _interval(values: Sequence[float], level: float) -> tuple[float, float, float]:
    mean = statistics.fmean(values)
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def areas_of(runs: Sequence[dict]) -> list[Area]:
    """The area of every line that has all budgets, over the seeds that it shares with uniform LoRA."""
    found = []
    for task in TASKS:
        uniform = _areas(_values(runs, task, UNIFORM, CUT))
        for name, arm, kind in lines():
            own = _areas(_values(runs, task, arm, kind))
            seeds = sorted(own.keys() & uniform.keys())
            if len(seeds) > 1:
                difference, low, high = t_interval([own[seed] - uniform[seed] for seed in seeds])
                area = statistics.fmean(own[seed] for seed in seeds)
                found.append(Area(task, name, area, difference, low, high, _steps(runs, task, arm, kind)))
    return found


def _areas(values: dict[int, dict[int, dict]]) -> dict[int, float]:
    """{seed: area} of the seeds that have every budget."""
    if set(values) != set(RANKS):
        return {}
    seeds = set.intersection(*(set(own) for own in values.values()))
    length = math.log2(RANKS[-1] / RANKS[0])
    return {seed: sum(
        math.log2(b / a) * (values[a][seed]["metric"] + values[b][seed]["metric"]) / 2 for a, b in pairwise(RANKS)
    ) / length for seed in seeds}  # fmt: skip


def _steps(runs: Sequence[dict], task: str, arm: str, kind: str) -> int:
    """Optimizer steps to tune the arm and to train one seed, at all budgets, with those of recoveries."""
    tuning = sum(r["steps"] for r in runs if (r["phase"], r["task"], r["arm"]) == ("rates", task, arm))
    steps = next(r["steps"] for r in runs if r["arm"] == arm)
    further = further_steps(steps) * (len(RANKS) - 1) if kind == RECOVERED else 0
    return tuning + steps * len(ranks_of(arm)) + further


def report(runs: Sequence[dict]) -> tuple[str, list[Row], list[Area]]:
    """The findings in Markdown, and what they are made of."""
    rows, areas = rows_of(runs), areas_of(runs)
    parts = []
    for task in TASKS:
        own = [row for row in rows if row.task == task]
        if own:
            parts += [f"## {task}", _table(own), _summary([area for area in areas if area.task == task], own)]
    return "\n\n".join(part for part in parts if part), rows, areas


def _table(rows: Sequence[Row]) -> str:
    cells = {(row.line, row.rank): _cell(row) for row in rows}
    names = list(dict.fromkeys(row.line for row in rows))
    ranks = [rank for rank in RANKS if any(row.rank == rank for row in rows)]
    return markdown(
        ("points of the metric", *(f"rank {rank}" for rank in ranks)),
        [(name, *(cells.get((name, rank), "") for rank in ranks)) for name in names],
    )


def _cell(row: Row) -> str:
    if row.line == UNIFORM:
        return f"{100 * row.metric:.1f}"
    said = f"{100 * row.difference:+.1f} ({100 * row.low:+.1f} to {100 * row.high:+.1f})"
    return f"**{said}**" if row.no_worse else said


def _summary(areas: Sequence[Area], rows: Sequence[Row]) -> str:
    def within(line: str) -> str:
        own = [row for row in rows if row.line == line]
        return f"{sum(row.no_worse for row in own)} of {len(own)}, {sum(row.level for row in own)} level"

    return markdown(
        ("line", "AURAC", "beside uniform LoRA (95 %)", "steps", "budgets no worse by more than 0.2 points"),
        [
            (
                area.line, f"{area.area:.4f}",
                "" if area.line == UNIFORM else f"{area.difference:+.4f} ({area.low:+.4f} to {area.high:+.4f})",
                f"{area.steps:,}", "" if area.line == UNIFORM else within(area.line),
            )
            for area in sorted(areas, key=lambda area: -area.area)
        ],
    ) if areas else ""  # fmt: skip
