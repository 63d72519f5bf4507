"""A figure with its title, caption, spoken label and the numbers it was drawn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from . import figures, figures_why, tables
from .facts import Facts
from .wording import ABSENT, count, fixed, number, plural, rank

MOST_COLUMNS = 24  # of a table of numbers, thinned evenly beyond
MOST_ROWS = 60
MOST_POINTS = MOST_ROWS // 2  # of one curve


@dataclass(frozen=True)
class Exhibit:
    """``key`` is unique on a page. ``rows`` hold ready text, and their cells after the first ``names`` columns are
    numbers; ``note`` says which numbers are left out."""

    key: str
    title: str
    svg: str
    caption: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    names: int = 1


def exhibit(
    key: str, title: str, draw: Callable[[str, str], str], caption: str, header: list[str], rows: list[list[str]],
    note: str = "", names: int = 1,
) -> Exhibit:
    """An exhibit whose drawing is ``draw(prefix of its ids, spoken label)``."""
    return Exhibit(key, title, draw(f"f-{key}", f"{title}. {caption}"), caption, header, rows, note, names)


def rank_map(run: Facts) -> list[Exhibit]:
    table = run.rank_map
    rows = [
        [role, *(ABSENT if c is None else str(c) for c in cells), rank(mean)]
        for role, cells, mean in zip(table.roles, table.cells, table.row_means, strict=True)
    ]
    final = run.trace.final_ranks
    rows.append(["mean", *(rank(m) for m in table.column_means), rank(sum(final) / len(final))])
    return [
        exhibit(
            "map",
            "Rank map",
            lambda p, t: figures.rank_map_figure(table, p, t),
            "The rank each layer ended with, by its role and its block. Darker is higher (lighter in dark mode); a "
            "dashed cell is rank 0.",
            ["role", *(c if c == tables.OUTSIDE else f"block {c}" for c in table.columns), "mean"],
            rows,
        )
    ]


def final_ranks(run: Facts) -> list[Exhibit]:
    rows, even = run.layers, rank(run.uniform_rank)
    listed = [
        [rows[i].name, str(rows[i].final_rank), even, str(rows[i].initial_rank)] for g in run.groups for i in g.layers
    ]
    return [
        exhibit(
            "ranks",
            "Final rank of each layer",
            lambda p, t: figures.final_ranks_figure(rows, run.groups, p, t),
            "Bars are final ranks, the pale bars behind them initial ranks. The dashed line is the rank every layer "
            f"would have had if the same budget had been spread equally ({even}).",
            ["layer", "final rank", "uniform", "initial rank"],
            listed,
        )
    ]


def course(run: Facts) -> list[Exhibit]:
    trace, table = run.trace, run.history
    if not trace.allocations:
        return []
    marks = {"end of warm-up": trace.budget.warmup_steps, "freeze": trace.budget.freeze_step}
    marks = {name: step for name, step in marks.items() if 0 < step <= max(trace.budget.total_steps, table.steps[-1])}
    unit = {"ranks": "ranks in all", "params": "parameters", "bytes": "bytes"}[trace.budget.unit]
    picked = thin(len(table.steps), MOST_COLUMNS)
    names = [f"step {count(table.steps[k])}" for k in picked]
    rows = [
        ["budget asked", *(count(table.asked[k]) for k in picked)],
        ["budget reached", *(count(table.reached[k]) for k in picked)],
        ["dropped", *(count(table.dropped[k]) for k in picked)],
        ["returned", *(count(table.returned[k]) for k in picked)],
        *([trace.layers[i].name, *(str(table.ranks[k][i]) for k in picked)] for g in run.groups for i in g.layers),
    ]
    exact = "Every allocation reached exactly what was asked. " if table.asked == table.reached else ""
    caption = (
        f"{exact}{plural(len(trace.allocations), 'allocation')}; dropped triplets count downwards, those that came "
        "back upwards."
    )
    note = ""
    if len(picked) < len(table.steps):
        note = f"{len(picked)} of {plural(len(table.steps), 'point')} shown; all are in the JSON."

    def draw(prefix: str, label: str) -> str:
        return figures.history_figure(table, run.groups, marks, trace.budget.total_steps, unit, prefix, label)

    return [exhibit("course", "Budget, churn and ranks over the steps", draw, caption, ["", *names], rows, note)]


def why(run: Facts) -> list[Exhibit]:
    return [*_scores(run), *_margin_over_steps(run)]


def _scores(run: Facts) -> list[Exhibit]:
    table = run.scores
    if table is None or not any(s > 0 for side in (table.kept, table.dropped) for layer in side for s in layer):
        return []
    rows = [
        [
            run.trace.layers[i].name,
            count(len(table.kept[i])),
            number(min(table.kept[i], default=None), 3),
            count(len(table.dropped[i])),
            number(max(table.dropped[i], default=None), 3),
        ]
        for g in run.groups
        for i in g.layers
    ]
    caption = (
        f"Scores at the last allocation (step {count(table.step)}), one dash a triplet; the dotted line is the "
        f"lowest kept. {_margin(table)}"
    )
    if table.left:
        caption += (
            f" Drawn as dropped too: {plural(table.left, 'triplet')} that left memory at earlier allocations, with "
            "the score of that time, which may stand above the line."
        )
    if table.unplotted:
        caption += f" {plural(table.unplotted, 'score')} of zero or below cannot be drawn on a log axis."
    return [
        exhibit(
            "scores",
            "Kept and dropped scores",
            lambda p, t: figures_why.scores_figure(table, run.groups, p, t),
            caption,
            ["layer", "kept", "lowest kept", "dropped", "highest dropped"],
            rows,
        )
    ]


def _margin(table: tables.ScoreTable) -> str:
    if table.highest_dropped is None:
        return "It dropped nothing." if table.left else "Nothing was dropped."
    if table.lowest_kept is None:
        return "Nothing was kept."
    if table.margin is None:
        return "All dropped scores are zero or below."
    if table.margin < 1:
        return (
            f"The lowest kept score is {number(table.margin, 3)}× the highest dropped: something other than the "
            "score alone decided there (a floor, a cap, or the cost of a rank)."
        )
    return f"The lowest kept score is {number(table.margin, 5)}× the highest dropped."


def _margin_over_steps(run: Facts) -> list[Exhibit]:
    past = run.history
    if not any(v is not None and v > 0 for v in past.lowest_kept + past.highest_dropped):
        return []
    rows = [
        [count(past.steps[k]), number(past.lowest_kept[k], 3), number(past.highest_dropped[k], 3)]
        for k in thin(len(past.steps), MOST_ROWS)
        if past.lowest_kept[k] is not None or past.highest_dropped[k] is not None
    ]
    return [
        exhibit(
            "margin",
            "The margin over the steps",
            lambda p, t: figures_why.margin_figure(past, p, t),
            "The lowest score kept and the highest dropped at each allocation. The closer the two lines, the more "
            "the choice between the last triplets hangs on noise.",
            ["step", "lowest kept", "highest dropped"],
            rows,
        )
    ]


def spectra(run: Facts) -> list[Exhibit]:
    sigma, rows, order = run.spectra, run.layers, [i for g in run.groups for i in g.layers]
    if not any(s > 0 for values in sigma for s in values):
        return []
    return [
        exhibit(
            "spectra",
            "Singular values of the updates",
            lambda p, t: figures_why.spectra_figure(sigma, run.groups, p, t),
            "True singular values of each layer's update ΔW, scaling included; the deeper the block, the darker the "
            "line (lighter in dark mode).",
            ["layer", "singular values"],
            [[rows[i].name, ", ".join(number(s, 3) for s in sigma[i]) or ABSENT] for i in order],
        ),
        exhibit(
            "effective",
            "Effective rank against the rank allotted",
            lambda p, t: figures_why.effective_figure(rows, run.groups, p, t),
            "Effective rank is exp(entropy) of the normalised singular values. A layer far below the diagonal was "
            "given more directions than it uses evenly.",
            ["layer", "allotted", "effective"],
            [[rows[i].name, str(rows[i].final_rank), fixed(rows[i].effective_rank, 2)] for i in order],
        ),
    ]


def quality(run: Facts, control: Facts | None) -> list[Exhibit]:
    panels, others = run.curves, control.curves if control is not None else []
    if not panels:
        return []
    series = [one for panel in panels for one in panel.series]
    rows = [
        [name, count(steps[k]), number(values[k])]
        for name, steps, values in series
        for k in thin(len(steps), MOST_POINTS)
    ]
    thinned = any(len(steps) > MOST_POINTS for _, steps, _ in series)
    return [
        exhibit(
            "curves",
            "Curves",
            lambda p, t: figures_why.curves_figure(panels, others, "uniform", p, t),
            "What the training loop logged." + (" Dashed: the uniform trial set beside it." if others else ""),
            ["quantity", "step", "value"],
            rows,
            f"At most {MOST_POINTS} points a curve; all are in the JSON." if thinned else "",
        )
    ]


def thin(n: int, most: int) -> list[int]:
    """At most ``most`` of the indices 0 … n - 1, evenly spaced, first and last included."""
    if n <= most:
        return list(range(n))
    return sorted({round(k * (n - 1) / (most - 1)) for k in range(most)})
