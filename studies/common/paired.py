"""From finished runs to a comparison: each arm at its own rate, paired with a reference by seed.

Every interval is a 95 % t interval over paired seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from scipy import stats

from .part import Part, value_of
from .table import interval, markdown

Runs = Sequence[dict[str, Any]]


def judged(part: Part, runs: Runs, place: str, arm: str) -> dict[int, dict]:
    """{seed: run} of phase "seeds" at the arm's chosen rate; a run that diverged has a "message"."""
    cell = ("seeds", place, arm, part.chosen_rate(runs, arm))
    mine = [run for run in runs if (run["phase"], run["place"], run["arm"], run["rate"]) == cell]
    return {run["seed"]: run for run in sorted(mine, key=lambda run: run["seed"])}


def paired(
    part: Part, runs: Runs, place: str, arm: str, reference: str, value: Callable[[dict], float] | None = None
) -> tuple[float, float, float, list[float]] | None:
    """(mean, low, high, difference of each seed) of an arm's value minus the reference's, with a t interval.

    None for the reference, below two seeds in common, and where a run of either diverged.
    """
    own, other = judged(part, runs, place, arm), judged(part, runs, place, reference)
    seeds = sorted(own.keys() & other.keys())
    if arm == reference or len(seeds) < 2 or any("message" in side[seed] for side in (own, other) for seed in seeds):
        return None
    value = value or part.value
    differences = [value(own[seed]) - value(other[seed]) for seed in seeds]
    return (*t_interval(differences), differences)


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean of at least two values and its 95 % t interval."""
    mean = statistics.fmean(values)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def rate_table(part: Part, runs: Runs) -> str:
    """The loss of every arm at every rate it was tried at, each seed; bold is the rate the arm is judged at."""
    found: dict[float, dict[str, list[float]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run["phase"] == "rates":
            found.setdefault(run["rate"], {}).setdefault(run["arm"], []).append(value_of(part, run))
    best = {arm: part.chosen_rate(runs, arm) for arm in part.arms}

    def cell(rate: float, arm: str) -> str:
        text = " ".join(f"{value:.4f}" for value in found[rate].get(arm, [])) or "–"
        return f"**{text}**" if rate == best[arm] else text

    rows = [[f"{rate:g}", *(cell(rate, arm) for arm in part.arms)] for rate in sorted(found)]
    return markdown(("rate", *part.arms), rows)


def difference(pair: tuple[float, float, float, list[float]] | None) -> str:
    return "–" if pair is None else f"{pair[0]:+.4f} ({interval(*pair[1:3])})"


def edge_note(part: Part, runs: Runs, arm: str) -> str:
    tuned = part.tuned(runs, arm)
    return " at an edge" if len(tuned) > 1 and part.chosen_rate(runs, arm) in (min(tuned), max(tuned)) else ""
