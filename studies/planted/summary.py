"""Finished runs in, rows out: one for each variant, network, method and learning rate."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from rankalloc.experiments.paired import paired_difference

from ..common.table import markdown
from .problems import VARIANTS
from .training import PROTOCOL, default_method, rate_of

TINY = 1e-30  # an error of zero has no logarithm


@dataclass(frozen=True)
class Row:
    """``errors``, ``exact`` and ``misplaced`` are in the order of ``seeds``.

    Attributes:
        ratio: (geometric mean, low, high) of the method's error over the default's on the same seeds, with a
            bootstrap 95 % interval over seeds; None for the default itself and below two seeds in common.
        tuned: whether the learning rate is the one the study gives this method.
    """

    variant: str
    architecture: str
    method: str
    rate: float
    steps: int
    seeds: tuple[int, ...]
    exact: tuple[float, ...]
    misplaced: tuple[float, ...]
    errors: tuple[float, ...]
    cpu_seconds: float
    ratio: tuple[float, float, float] | None
    tuned: bool

    @property
    def median(self) -> float:
        return statistics.median(self.errors)

    @property
    def verdict(self) -> str:
        """Whether the default's error is lower or higher than this method's."""
        if self.ratio is None:
            return "–"
        _, low, high = self.ratio
        return "lower" if low > 1 else "higher" if high < 1 else "within the interval"


def rows(record: dict) -> list[Row]:
    """All groups of runs of the present protocol, by variant, network and median error."""
    groups: dict[tuple, dict[int, dict]] = {}
    for item in record["runs"]:
        if item["protocol"] == PROTOCOL:
            key = tuple(item[name] for name in ("variant", "architecture", "method", "rate", "steps"))
            groups.setdefault(key, {})[item["seed"]] = item
    default = default_method()
    found = []
    for (variant, architecture, method, rate, steps), items in groups.items():
        rivals = groups.get((variant, architecture, default, rate_of(default), steps), {})
        same = method == default and rate == rate_of(default)
        runs = [items[seed] for seed in sorted(items)]
        found.append(Row(
            variant, architecture, method, rate, steps, tuple(sorted(items)), tuple(r["exact"] for r in runs),
            tuple(r["misplaced"] for r in runs), tuple(r["relative_error"] for r in runs),
            statistics.mean(r["cpu_seconds"] for r in runs), None if same else _ratio(items, rivals),
            rate == rate_of(method),
        ))
    order = list(VARIANTS)
    return sorted(found, key=lambda r: (order.index(r.variant), r.architecture, r.steps, r.median, r.method, r.rate))


def _ratio(items: dict[int, dict], rivals: dict[int, dict]) -> tuple[float, float, float] | None:
    shared = sorted(set(items) & set(rivals))
    if len(shared) < 2:
        return None
    mine, theirs = ([math.log10(max(TINY, runs[s]["relative_error"])) for s in shared] for runs in (items, rivals))
    found = paired_difference(mine, theirs)
    return tuple(10 ** found[name] for name in ("difference", "low", "high"))


def ratio_text(row: Row) -> str:
    return "–" if row.ratio is None else "{} [{}, {}]".format(*(times(value) for value in row.ratio))


def times(value: float) -> str:
    """A factor in two digits: 0.35, 1.2, 40, 3e+05."""
    return f"{value:.0f}" if 9.5 <= value < 1e4 else f"{value:.2g}" if 1e-2 <= value < 9.5 else f"{value:.0e}"


def exact_text(row: Row) -> str:
    return "–" if row.variant == "half" else f"{statistics.mean(row.exact):.1%}"


HEADER = ("variant", "network", "method", "rate", "seeds", "layers exact", "ranks misplaced",
          "relative error, median", "worst", "error ÷ default's [95 %]", "default's error is", "CPU s")


def cells(row: Row) -> list[str]:
    return [
        row.variant, row.architecture, row.method, f"{row.rate:g}", str(len(row.seeds)), exact_text(row),
        f"{statistics.mean(row.misplaced):.1%}", f"{row.median:.1e}", f"{max(row.errors):.1e}", ratio_text(row),
        row.verdict, f"{row.cpu_seconds:.1f}",
    ]


def table(record: dict) -> str:
    """Markdown: shares and seconds are means over seeds."""
    return markdown(HEADER, [cells(row) for row in rows(record)])
