"""The figures of a run with their captions and numbers."""

from __future__ import annotations

from . import figures, figures_curves, figures_map, figures_why, grids, tables
from .exhibit import Exhibit
from .facts import Facts
from .tables import thin
from .wording import ABSENT, count, fixed, number, plural, rank

MOST_COLUMNS = 24  # of a table of numbers, thinned evenly beyond
MOST_ROWS = 60
MOST_POINTS = MOST_ROWS // 2  # of one curve
MOST_LAYERS = 400  # that a figure's numbers list one by one; beyond, the full table does
MOST_EVENTS = 300  # allocations that are drawn one by one

_IN_TABLE = "The numbers of each layer are in the full table."


def rank_map(run: Facts, place: int = 0, name: str = "", top: int | None = None) -> list[Exhibit]:
    """The rank map of the run at ``place`` on its page; ``name`` tells two of them apart, ``top`` is their scale's."""
    table, final = run.rank_map, run.trace.final_ranks
    rows = [
        [role, *(ABSENT if c is None else str(c) for c in cells), rank(mean)]
        for role, cells, mean in zip(table.roles, table.cells, table.row_means, strict=True)
    ]
    rows.append(["mean", *(rank(m) for m in table.column_means), rank(sum(final) / len(final))])
    return [
        Exhibit(
            f"map{place or ''}",
            f"Rank map{name and f' of {name}'}",
            lambda: figures_map.rank_map_figure(table, top),
            "The rank each layer ended with, by its role and its block. Darker is higher (lighter in dark mode); a "
            "dashed cell is rank 0.",
            map_header(table),
            rows,
            cells=f"layers{place or ''}",
            timed=len(run.history.steps) > 1,
        )
    ]


def map_header(table: grids.RankMap, first: str = "role") -> list[str]:
    """The header of a map's numbers."""
    return [first, *(c if c == grids.OUTSIDE else f"block {c}" for c in table.columns), "mean"]


def final_ranks(run: Facts) -> list[Exhibit]:
    rows, even = run.layers, rank(run.uniform_rank)
    listed = [
        [rows[i].name, str(rows[i].final_rank), even, str(rows[i].initial_rank)] for g in run.groups for i in g.layers
    ]
    header = ["layer", "final rank", "uniform", "initial rank"]
    note = ""
    if len(rows) > MOST_LAYERS:
        header = ["role", "mean final rank", "uniform", "lowest", "highest"]
        listed = [
            [g.label, rank(sum(final) / len(final)), even, str(min(final)), str(max(final))]
            for g in run.groups if (final := [rows[i].final_rank for i in g.layers])
        ]  # fmt: skip
        note = _IN_TABLE
    return [
        Exhibit(
            "ranks",
            "Final rank of each layer",
            lambda: figures.final_ranks_figure(rows, run.groups),
            "Bars are final ranks, the pale bars behind them initial ranks. The dashed line is the rank every layer "
            f"would have had if the same budget had been spread equally ({even}).",
            header,
            listed,
            note,
            cells="layers",
        )
    ]


def course(run: Facts) -> list[Exhibit]:
    trace, table = run.trace, run.history
    if not trace.allocations:
        return []
    drawn = tables.thinned(table, MOST_EVENTS)
    marks = {"end of warm-up": trace.budget.warmup_steps, "freeze": trace.budget.freeze_step}
    marks = {name: step for name, step in marks.items() if 0 < step <= max(trace.budget.total_steps, table.steps[-1])}
    unit = {"ranks": "ranks in all", "params": "parameters", "bytes": "bytes"}[trace.budget.unit]
    picked = thin(len(table.steps), MOST_COLUMNS)
    names = [f"step {count(table.steps[k])}" for k in picked]
    if len(trace.layers) <= MOST_LAYERS:
        by_layer = [
            [trace.layers[i].name, *(str(table.ranks[k][i]) for k in picked)] for g in run.groups for i in g.layers
        ]
    else:
        by_layer = [
            [f"mean of {g.label}", *(rank(sum(table.ranks[k][i] for i in g.layers) / len(g.layers)) for k in picked)]
            for g in run.groups
        ]
    rows = [
        ["budget asked", *(count(table.asked[k]) for k in picked)],
        ["budget reached", *(count(table.reached[k]) for k in picked)],
        ["dropped", *(count(table.dropped[k]) for k in picked)],
        ["returned", *(count(table.returned[k]) for k in picked)],
        *by_layer,
    ]
    exact = "Every allocation reached exactly what was asked. " if table.asked == table.reached else ""
    caption = (
        f"{exact}{plural(len(trace.allocations), 'allocation')}; dropped triplets count downwards, those that came "
        "back upwards."
    )
    if len(trace.layers) > figures.MOST_STRIPS:
        caption += " Neighbouring blocks of a role share a strip, which shows their mean."
    note = ""
    if len(picked) < len(table.steps):
        note = f"{len(picked)} of {plural(len(table.steps), 'point')} shown; all are in the JSON."

    return [Exhibit(
        "course", "Budget, churn and ranks over the steps",
        lambda: figures.history_figure(drawn, run.groups, marks, trace.budget.total_steps, unit),
        caption, ["", *names], rows, note,
    )]  # fmt: skip


def why(run: Facts) -> list[Exhibit]:
    return [*_scores(run), *_margin_over_steps(run)]


def _scores(run: Facts) -> list[Exhibit]:
    table = run.scores
    if table is None or not any(s > 0 for side in (table.kept, table.dropped) for layer in side for s in layer):
        return []
    places = [(g.label, g.layers) for g in run.groups]
    if len(run.trace.layers) <= MOST_LAYERS:
        places = [(run.trace.layers[i].name, [i]) for _, members in places for i in members]
    rows = []
    for name, members in places:
        kept, dropped = ([s for i in members for s in side[i]] for side in (table.kept, table.dropped))
        rows.append([
            name, count(len(kept)), number(min(kept, default=None), 3), count(len(dropped)),
            number(max(dropped, default=None), 3),
        ])  # fmt: skip
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
        Exhibit(
            "scores",
            "Kept and dropped scores",
            lambda: figures_why.scores_figure(table, run.groups),
            caption,
            ["layer" if len(places) > len(run.groups) else "role", "kept", "lowest kept", "dropped", "highest dropped"],
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
    drawn = tables.thinned(past, MOST_EVENTS)
    rows = [
        [count(past.steps[k]), number(past.lowest_kept[k], 3), number(past.highest_dropped[k], 3)]
        for k in thin(len(past.steps), MOST_ROWS)
        if past.lowest_kept[k] is not None or past.highest_dropped[k] is not None
    ]
    return [
        Exhibit(
            "margin",
            "The margin over the steps",
            lambda: figures_why.margin_figure(drawn),
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
    many = len(rows) > MOST_LAYERS
    listed = [[rows[i].name, ", ".join(number(s, 3) for s in sigma[i]) or ABSENT] for i in order]
    allotted = [[rows[i].name, str(rows[i].final_rank), fixed(rows[i].effective_rank, 2)] for i in order]
    if many:
        listed = [[g.label, number(max((sigma[i][0] for i in g.layers if sigma[i]), default=None), 3)]
                  for g in run.groups]  # fmt: skip
        allotted = [[g.label, *_means(rows, g.layers)] for g in run.groups]
    return [
        Exhibit(
            "spectra",
            "Singular values of the updates",
            lambda: figures_why.spectra_figure(sigma, run.groups),
            "True singular values of each layer's update ΔW, scaling included; the deeper the block, the darker the "
            "line (lighter in dark mode)."
            + (f" Of a role with many blocks, {figures_why.MOST_BLOCKS} are drawn, evenly spaced." if many else ""),
            ["role", "largest singular value"] if many else ["layer", "singular values"],
            listed,
            _IN_TABLE if many else "",
        ),
        Exhibit(
            "effective",
            "Effective rank against the rank allotted",
            lambda: figures_why.effective_figure(rows, run.groups),
            "Effective rank is exp(entropy) of the normalised singular values. A layer far below the diagonal was "
            "given more directions than it uses evenly.",
            ["role", "mean allotted", "mean effective"] if many else ["layer", "allotted", "effective"],
            allotted,
            _IN_TABLE if many else "",
        ),
    ]


def _means(rows: list[tables.LayerRow], members: list[int]) -> list[str]:
    found = [rows[i].effective_rank for i in members]
    known = [value for value in found if value is not None]
    return [
        rank(sum(rows[i].final_rank for i in members) / len(members)),
        fixed(sum(known) / len(known) if known else None, 2),
    ]


def quality(run: Facts, control: Facts | None, other: str = "uniform") -> list[Exhibit]:
    """The curves; ``other`` is what those of ``control``, which are dashed, are called."""
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
        Exhibit(
            "curves",
            "Curves",
            lambda: figures_curves.curves_figure(panels, others, other),
            "What the training loop logged."
            + (f" Dashed: the {other} trial set beside it." if others and other == "uniform" else "")
            + (f" Dashed: {other}." if others and other != "uniform" else ""),
            ["quantity", "step", "value"],
            rows,
            f"At most {MOST_POINTS} points a curve; all are in the JSON." if thinned else "",
        )
    ]
