"""A figure with its title, caption, spoken label and the numbers it was drawn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rankalloc.trace import RankTrace

from . import figures, figures_why, tables
from .wording import ABSENT, count, fixed, number, plural, rank

MOST_COLUMNS = 24  # of a table of numbers, thinned evenly beyond
MOST_ROWS = 60


@dataclass(frozen=True)
class Exhibit:
    """``rows`` hold ready text; ``note`` says what the table leaves out. Cells after the first
    ``names`` columns are numbers."""

    key: str
    title: str
    svg: str
    caption: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    names: int = 1


def exhibit(
    key: str, title: str, draw: Callable[[str, str], str], caption: str, header, rows, note="", names=1
) -> Exhibit:
    return Exhibit(key, title, draw(f"f-{key}", f"{title}. {caption}"), caption, header, rows, note, names)


def rank_map(trace: RankTrace) -> list[Exhibit]:
    table = tables.rank_map(trace)
    rows = [
        [role, *(ABSENT if c is None else str(c) for c in cells), rank(mean)]
        for role, cells, mean in zip(table.roles, table.cells, table.row_means, strict=True)
    ]
    rows.append(["mean", *(rank(m) for m in table.column_means), rank(sum(trace.final_ranks) / len(trace.layers))])
    caption = (
        "The rank each layer ended with, by its role and its block. Darker is higher (lighter in dark mode); a "
        "dashed cell is "
        "rank 0."
    )
    return [
        exhibit(
            "map",
            "Rank map",
            lambda p, t: figures.rank_map_figure(table, p, t),
            caption,
            ["role", *(c if c == tables.OUTSIDE else f"block {c}" for c in table.columns), "mean"],
            rows,
        )
    ]


def final_ranks(trace: RankTrace, rows: list[tables.LayerRow]) -> list[Exhibit]:
    even = tables.uniform_rank(trace)
    grouped = tables.groups(trace)
    caption = (
        f"Bars are final ranks, the pale bars behind them initial ranks. The dashed line is the rank every layer "
        "would have "
        f"had if the same budget had been spread equally ({rank(even)})."
    )
    listed = [
        [rows[i].name, str(rows[i].final_rank), rank(even), str(rows[i].initial_rank)]
        for g in grouped
        for i in g.layers
    ]
    return [
        exhibit(
            "ranks",
            "Final rank of each layer",
            lambda p, t: figures.final_ranks_figure(rows, grouped, p, t),
            caption,
            ["layer", "final rank", "uniform", "initial rank"],
            listed,
        )
    ]


def course(trace: RankTrace) -> list[Exhibit]:
    if not trace.allocations:
        return []
    table, grouped = tables.history(trace), tables.groups(trace)
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
    ]
    rows += [[trace.layers[i].name, *(str(table.ranks[k][i]) for k in picked)] for g in grouped for i in g.layers]
    exact = table.asked == table.reached
    caption = (
        ("Every allocation reached exactly what was asked. " if exact else "")
        + f"{plural(len(trace.allocations), 'allocation')}; dropped triplets count downwards, those that came back "
        "upwards."
    )
    note = (
        ""
        if len(picked) == len(table.steps)
        else f"{len(picked)} of {plural(len(table.steps), 'point')} shown; all are in the JSON."
    )

    def draw(prefix: str, label: str) -> str:
        return figures.history_figure(table, grouped, marks, trace.budget.total_steps, unit, prefix, label)

    return [exhibit("course", "Budget, churn and ranks over the steps", draw, caption, ["", *names], rows, note)]


def why(trace: RankTrace) -> list[Exhibit]:
    made, grouped, table = [], tables.groups(trace), tables.score_table(trace)
    if table is not None and any(s > 0 for side in (table.kept, table.dropped) for layer in side for s in layer):
        rows = []
        for g in grouped:
            for i in g.layers:
                kept, dropped = table.kept[i], table.dropped[i]
                rows.append(
                    [
                        trace.layers[i].name,
                        count(len(kept)),
                        number(min(kept, default=None), 3),
                        count(len(dropped)),
                        number(max(dropped, default=None), 3),
                    ]
                )
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
        made.append(
            exhibit(
                "scores",
                "Kept and dropped scores",
                lambda p, t: figures_why.scores_figure(table, grouped, p, t),
                caption,
                ["layer", "kept", "lowest kept", "dropped", "highest dropped"],
                rows,
            )
        )
    past = tables.history(trace)
    if any(v is not None and v > 0 for v in past.lowest_kept + past.highest_dropped):
        picked = [
            k
            for k in thin(len(past.steps), MOST_ROWS)
            if past.lowest_kept[k] is not None or past.highest_dropped[k] is not None
        ]
        rows = [
            [count(past.steps[k]), number(past.lowest_kept[k], 3), number(past.highest_dropped[k], 3)] for k in picked
        ]
        made.append(
            exhibit(
                "margin",
                "The margin over the steps",
                lambda p, t: figures_why.margin_figure(past, p, t),
                "The lowest score kept and the highest dropped at each allocation. The closer the two lines, the more "
                "the choice between the last triplets hangs on noise.",
                ["step", "lowest kept", "highest dropped"],
                rows,
            )
        )
    return made


def _margin(table: tables.ScoreTable) -> str:
    if table.lowest_kept is None or table.highest_dropped is None:
        if table.highest_dropped is None:
            return "It dropped nothing." if table.left else "Nothing was dropped."
        return "Nothing was kept."
    if table.margin is None:
        return "All dropped scores are zero or below."
    if table.margin < 1:
        return (
            f"The lowest kept score is {number(table.margin, 3)}× the highest dropped: something other than the "
            "score alone "
            "decided there (a floor, a cap, or the cost of a rank)."
        )
    return f"The lowest kept score is {number(table.margin, 5)}× the highest dropped."


def spectra(trace: RankTrace, rows: list[tables.LayerRow]) -> list[Exhibit]:
    sigma, grouped = tables.spectra(trace), tables.groups(trace)
    if not any(s > 0 for values in sigma for s in values):
        return []
    listed = [[rows[i].name, ", ".join(number(s, 3) for s in sigma[i]) or ABSENT] for g in grouped for i in g.layers]
    first = exhibit(
        "spectra",
        "Singular values of the updates",
        lambda p, t: figures_why.spectra_figure(sigma, grouped, p, t),
        "True singular values of each layer's update ΔW, scaling included; the deeper the block, the darker the line "
        "(lighter in dark mode).",
        ["layer", "singular values"],
        listed,
    )
    used = [
        [rows[i].name, str(rows[i].final_rank), fixed(rows[i].effective_rank, 2)] for g in grouped for i in g.layers
    ]
    second = exhibit(
        "effective",
        "Effective rank against the rank allotted",
        lambda p, t: figures_why.effective_figure(rows, grouped, p, t),
        "Effective rank is exp(entropy) of the normalised singular values. A layer far below the diagonal was given "
        "more "
        "directions than it uses evenly.",
        ["layer", "allotted", "effective"],
        used,
    )
    return [first, second]


def quality(trace: RankTrace, control: RankTrace | None) -> list[Exhibit]:
    panels = tables.curves(trace)
    if not panels:
        return []
    others = tables.curves(control) if control is not None else []
    rows = []
    for panel in panels:
        for name, steps, values in panel.series:
            rows += [[name, count(steps[k]), number(values[k])] for k in thin(len(steps), MOST_ROWS // 2)]
    note = (
        "At most 30 points a curve; all are in the JSON."
        if any(len(s[1]) > 30 for p in panels for s in p.series)
        else ""
    )
    caption = "What the training loop logged." + (" Dashed: the uniform trial set beside it." if others else "")
    return [
        exhibit(
            "curves",
            "Curves",
            lambda p, t: figures_why.curves_figure(panels, others, "uniform", p, t),
            caption,
            ["quantity", "step", "value"],
            rows,
            note,
        )
    ]


def thin(n: int, most: int) -> list[int]:
    """At most ``most`` of the indices 0 … n - 1, evenly spaced, first and last included."""
    if n <= most:
        return list(range(n))
    return sorted({round(k * (n - 1) / (most - 1)) for k in range(most)})
