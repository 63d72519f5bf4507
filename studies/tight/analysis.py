"""From finished runs to the findings: rates, the best pattern by hand, paired differences, tables and sentences.

A difference is the other arm's loss minus auto's, in nats a word: above zero auto is better. Intervals are 95 % t
intervals over paired seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..common import grid
from ..common.paired import t_interval
from ..common.table import interval, markdown
from .arms import ARMS, AS_AUTO, AUTO, HAND, SIZES, TASKS, grid_of

LEVEL = 0.003
"""Nats a word up to which two losses count as level."""


class Choice(NamedTuple):
    """An arm, the rate it is judged at, and its loss on the tune split there."""

    arm: str
    rate: float
    loss: float


class Row(NamedTuple):
    """auto beside another arm: means over seeds, and the paired difference with its interval."""

    task: str
    size: str
    arm: str
    rate: float
    at_edge: bool
    params: int
    seeds: int
    loss: float
    metric: float
    difference: float
    low: float
    high: float


def tune_losses(runs: Sequence[dict], task: str, size: str, arm: str) -> dict[float, float]:
    """{rate: loss on the tune split}, infinite where training diverged."""
    mine = [r for r in runs if (r["phase"], r["task"], r["size"], r["arm"]) == ("rates", task, size, arm)]
    return grid.mean_losses(((run["rate"], run.get("loss", math.inf)) for run in mine), 1)


def chosen(runs: Sequence[dict], rates: Sequence[float] | None, task: str, size: str, arm: str) -> Choice | None:
    """The rate that an arm is judged at; None until it is settled. ``rates`` are tried in place of the arm's grid."""
    losses = tune_losses(runs, task, size, arm)
    if not losses or (grid.Grid.fixed(rates) if rates else grid_of(arm)).wanted(losses):
        return None
    best = grid.best_rate(losses)
    return None if best is None else Choice(arm, best, losses[best])


def rows_of(runs: Sequence[dict], rates: Sequence[float] | None) -> list[Row]:
    """Every arm beside auto, wherever at least two seeds are paired."""
    found = []
    for task in TASKS:
        for size in SIZES:
            auto = _judged(runs, rates, task, size, AUTO)
            for arm in ARMS:
                own = _judged(runs, rates, task, size, arm)
                seeds = sorted(own.keys() & auto.keys())
                if len(seeds) < 2:
                    continue
                difference, low, high = t_interval([own[seed]["loss"] - auto[seed]["loss"] for seed in seeds])
                losses, rate = tune_losses(runs, task, size, arm), own[seeds[0]]["rate"]
                found.append(Row(
                    task, size, arm, rate, len(losses) > 1 and rate in (min(losses), max(losses)),
                    max(own[seed]["params"] for seed in seeds), len(seeds),
                    statistics.fmean(own[seed]["loss"] for seed in seeds),
                    statistics.fmean(own[seed]["metric"] for seed in seeds), difference, low, high,
                ))  # fmt: skip
    return found


def _judged(runs: Sequence[dict], rates: Sequence[float] | None, task: str, size: str, arm: str) -> dict[int, dict]:
    choice = chosen(runs, rates, task, size, AUTO if arm in AS_AUTO else arm)
    if choice is None:
        return {}
    cell = ("seeds", task, size, arm, choice.rate)
    return {
        run["seed"]: run for run in runs
        if (run["phase"], run["task"], run["size"], run["arm"], run["rate"]) == cell and "loss" in run
    }


def report(runs: Sequence[dict], rates: Sequence[float] | None) -> tuple[str, list[Row]]:
    """The findings in Markdown, and the rows that they are made of."""
    rows = rows_of(runs, rates)
    parts = []
    for task in TASKS:
        for size in SIZES:
            own = [row for row in rows if (row.task, row.size) == (task, size)]
            if own:
                parts += [f"## {task}, {size} {'' if size == 'one' else 'of a '}rank a layer",
                          _table(own), _verdict(own), _patterns(runs, task, size)]
    return "\n\n".join(part for part in parts if part), rows


def _table(rows: Sequence[Row]) -> str:
    header = ("arm", "rate", "parameters as a LoRA", "seeds", "loss", "metric", "auto is better by", "95 % interval")
    return markdown(header, [
        (
            row.arm, f"{row.rate:g}" + (" at an edge" if row.at_edge else ""), f"{row.params:,}", str(row.seeds),
            f"{row.loss:.4f}", f"{row.metric:.4f}",
            *(("", "") if row.arm == AUTO else (f"{row.difference:+.4f}", interval(row.low, row.high))),
        )
        for row in sorted(rows, key=lambda row: row.loss)
    ])  # fmt: skip


def _verdict(rows: Sequence[Row]) -> str:
    by_hand = next((row for row in rows if row.arm in HAND), None)
    if by_hand is None:
        return ""
    said = (
        "better" if by_hand.low > 0 else "worse" if by_hand.high < 0
        else "level within 0.003" if by_hand.low > -LEVEL else "not shown to differ"
    )
    return (
        f"Beside the pattern by hand that was best on the tune split ({by_hand.arm}): auto is {said} "
        f"({by_hand.difference:+.4f}, {interval(by_hand.low, by_hand.high)})."
    )


def _patterns(runs: Sequence[dict], task: str, size: str) -> str:
    """The loss on the tune split of every pattern by hand at its best rate: what the best one was chosen from."""
    found: list[tuple[float, str, Any]] = []
    for arm in (AUTO, *HAND):
        losses = tune_losses(runs, task, size, arm)
        best = grid.best_rate(losses)
        if best is not None:
            found.append((losses[best], arm, best))
    said = "; ".join(f"{arm} {loss:.4f} at {rate:g}" for loss, arm, rate in sorted(found))
    return f"On the tune split, one seed: {said}." if found else ""
