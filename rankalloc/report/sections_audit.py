"""The sections of an audit's page: the answer, the differences, the runs, the tuning, and where the ranks went."""

from __future__ import annotations

import statistics
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..audit_record import ArmRecord, AuditRecord, ComparisonRecord
from . import colours, figures_map, grids, svg
from .audited import audit_of, difference, outcome_of, sentence_of, unit
from .exhibit import Exhibit
from .exhibits import map_header
from .facts import Subject
from .section import Section, Shown
from .wording import ABSENT, count, duration, fixed, number, percent, plural, rank

_CLAIMS = {"better": "the method is better", "worse": "the method is worse", "equivalent": "equivalent",
           "undecided": "undecided"}  # fmt: skip


def _answer(page: Subject) -> Shown | None:
    record = audit_of(page.parts)
    return {
        "record": record, "sentence": sentence_of(record), "outcome": outcome_of(record),
        "alerts": [*record.alerts, *page.notes], "ran": [arm for arm in record.arms if arm.skipped is None],
        "left_out": [arm for arm in record.arms if arm.skipped is not None],
    }


def _differences(page: Subject) -> Shown | None:
    record = audit_of(page.parts)
    if not record.comparisons:
        return None
    metric = record.metric
    header = ["Against", "Verdict", f"Mean, {unit(metric)}", "Low", "High", "Low, examples too", "High, examples too",
              "p", "Hedges’ g", "Seeds"]  # fmt: skip
    rows = [
        [one.arm, _CLAIMS[one.claim], difference(one.mean, metric, True),
         *(ABSENT if value is None else difference(value, metric, True)
           for value in (one.low, one.high, one.both_low, one.both_high)),
         number(one.p, 2), ABSENT if one.effect is None else number(one.effect, 2), count(one.seeds)]
        for one in record.comparisons
    ]  # fmt: skip
    forest = Exhibit(
        "forest", f"What {record.method} gains over each arm", lambda: _forest(record),
        f"The difference {record.metric if unit(metric).startswith('in') else unit(metric)} on the report split, mean "
        f"over {plural(record.seeds, 'paired seed')}; to the right the audited method is better. The thick line is the "
        "90 % interval of the test, which holds over all looks; the thin one also holds the choice of examples. A "
        "hollow mark: nothing is shown. The band is the margin within which arms count as equivalent.",
        header, rows, names=2,
    )  # fmt: skip
    return {"figures": [forest], "details": record.details, "header": header, "rows": rows, "names": 2}


def _forest(record: AuditRecord) -> Figure:
    ones = list(reversed(record.comparisons))
    figure = svg.canvas(0.9 + 0.34 * len(ones))
    axes = figure.add_subplot()
    axes.axvspan(-record.margin, record.margin, color=colours.GHOST, zorder=0)
    axes.axvline(0, color=colours.MUTED, linewidth=0.9, zorder=1)
    for line, one in enumerate(ones):
        color = {"better": colours.ADAPTIVE, "worse": colours.UNIFORM}.get(one.claim, colours.MUTED)
        for low, high, width in ((one.both_low, one.both_high, 0.9), (one.low, one.high, 2.4)):
            if low is not None and high is not None:
                axes.plot([low, high], [line, line], color=color, linewidth=width, solid_capstyle="butt", zorder=2)
        hollow = one.claim == "undecided"
        axes.plot(one.mean, line, "o", color=color, markersize=6, mfc=colours.SURFACE if hollow else color, zorder=3)
    axes.set_yticks(range(len(ones)), [figures_map.shorten(one.arm, 24) for one in ones])
    axes.set(xlabel=f"gain of {record.method} in {record.metric}", ylim=(-0.6, len(ones) - 0.4))
    axes.set_xlim(*_reach(record, ones))
    axes.grid(axis="x")
    return figure


def _reach(record: AuditRecord, ones: list[ComparisonRecord]) -> tuple[float, float]:
    """Ends of the axis. An interval of few seeds may be far longer than all differences: it is cut off then."""
    means = [abs(one.mean) for one in ones]
    known = sorted(abs(end) for one in ones for end in (one.low, one.high) if end is not None)
    most = max([*means, record.margin, known[int(0.8 * (len(known) - 1))] if known else 0.0]) * 1.15
    lows = [end for one in ones for end in (one.low, one.both_low, one.mean) if end is not None]
    highs = [end for one in ones for end in (one.high, one.both_high, one.mean) if end is not None]
    return max(-most * 1.6, min([*lows, -record.margin]) * 1.08), min(most * 1.6, max([*highs, record.margin]) * 1.08)


def _arms(page: Subject) -> Shown | None:
    record = audit_of(page.parts)
    arms = [arm for arm in record.arms if arm.runs]
    if not arms:
        return None
    seeds = [run.seed for run in max(arms, key=lambda arm: len(arm.runs)).runs]
    by_seed = [
        [arm.name, *(ABSENT if run.value is None else number(run.value) for run in arm.runs),
         *[ABSENT] * (len(seeds) - len(arm.runs))] for arm in arms
    ]  # fmt: skip
    shown = Exhibit(
        "seeds", f"{record.metric} of every arm, by seed", lambda: _strip(record, arms),
        f"{record.metric} on the report split: a mark for each seed, a bar at their mean. Grey lines join the runs of "
        "one seed.", ["Arm", *(f"seed {seed}" for seed in seeds)], by_seed,
    )  # fmt: skip
    header = ["Arm", "What it is", f"{record.metric}, mean", "Loss, mean", "Parameters", "At most while training",
              "Learning rate", "Steps a run", "Seconds a run"]  # fmt: skip
    return {"figures": [shown], "details": [], "header": header, "rows": [_arm_row(arm) for arm in arms], "names": 2}


def _arm_row(arm: ArmRecord) -> list[str]:
    def mean(name: str) -> float | None:
        values = [value for run in arm.runs if (value := getattr(run, name)) is not None]
        return statistics.fmean(values) if values else None

    sizes = [run.params for run in arm.runs if run.params is not None]
    peaks = [run.peak_params for run in arm.runs if run.peak_params is not None]
    value, loss, seconds, steps = (mean(name) for name in ("value", "loss", "seconds", "steps"))
    rate = ABSENT if arm.rate is None else f"{arm.rate:.2g}{' (an edge)' if arm.at_edge else ''}"
    return [
        arm.name, arm.what, fixed(value), fixed(loss), count(max(sizes)) if sizes else ABSENT,
        count(max(peaks)) if peaks else ABSENT, rate, number(steps), ABSENT if seconds is None else f"{seconds:.0f}",
    ]


def _strip(record: AuditRecord, arms: list[ArmRecord]) -> Figure:
    figure = svg.canvas(3.4)
    axes = figure.add_subplot()
    for index in range(max(len(arm.runs) for arm in arms)):
        points = [
            (place, value) for place, arm in enumerate(arms)
            if index < len(arm.runs) and (value := arm.runs[index].value) is not None
        ]
        axes.plot(*zip(*points, strict=True), color=colours.GRID, linewidth=0.9, zorder=1)
    for place, arm in enumerate(arms):
        values = [run.value for run in arm.runs if run.value is not None]
        color = colours.ADAPTIVE if place == 0 else colours.UNIFORM if arm.name == "uniform" else colours.MUTED
        axes.plot([place] * len(values), values, "o", color=color, markersize=4.5, alpha=0.85, zorder=2)
        if values:
            mean = statistics.fmean(values)
            axes.plot([place - 0.22, place + 0.22], [mean, mean], color=color, linewidth=2.2, zorder=3)
    slanted = svg.medium().narrow or len(arms) > 9
    axes.set_xticks(
        range(len(arms)), [figures_map.shorten(arm.name, 16) for arm in arms], rotation=30 if slanted else 0,
        ha="right" if slanted else "center",
    )
    axes.set_ylabel(record.metric)
    axes.grid(axis="y")
    return figure


def _tuning(page: Subject) -> Shown | None:
    record = audit_of(page.parts)
    arms = [arm for arm in record.arms if arm.tried]
    if not arms:
        return None
    rows = [
        [arm.name, f"{one.rate:.3g}{' *' if one.rate == arm.rate else ''}", fixed(one.value)]
        for arm in arms for one in sorted(arm.tried, key=lambda one: one.rate)
    ]
    shown = Exhibit(
        "tuning", "How the arms were tuned", lambda: _tuned(record, arms),
        f"{record.metric} on the tune split against the learning rate, one run each. The chosen rate of each arm is "
        "marked; in the numbers it has a star.", ["Arm", "Learning rate", f"{record.metric} on the tune split"], rows,
    )  # fmt: skip
    return {"figures": [shown], "details": [], "header": [], "rows": [], "names": 1}


def _tuned(record: AuditRecord, arms: list[ArmRecord]) -> Figure:
    figure = svg.canvas(3.6)
    axes = figure.add_subplot()
    key, rates = [], [one.rate for arm in arms for one in arm.tried]
    values = sorted(one.value for arm in arms for one in arm.tried if one.value is not None)
    styles: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
    for place, arm in enumerate(arms):
        done = [(one.rate, one.value) for one in sorted(arm.tried, key=lambda one: one.rate) if one.value is not None]
        if not done:
            continue
        color = colours.LINES[place % len(colours.LINES)]
        style = styles[place // len(colours.LINES) % len(styles)]
        axes.plot(*zip(*done, strict=True), style, color=color, linewidth=1.5, marker="o", markersize=2.5)
        best = next((value for rate, value in done if rate == arm.rate), None)
        if best is not None and arm.rate is not None:
            axes.plot(arm.rate, best, "o", color=color, markersize=6.5)
        key.append(Line2D([], [], color=color, linestyle=style, label=figures_map.shorten(arm.name, 20)))
    svg.logarithmic(axes, "x", min(rates) / 1.25, max(rates) * 1.25)
    if len(values) > 4:  # a rate at which nothing is learnt would flatten all else
        middle, spread = values[len(values) // 2], max(values[-1] - values[len(values) // 4], 1e-9)
        if record.direction == "maximize":
            axes.set_ylim(max(values[0] - 0.1 * spread, middle - 2 * spread), values[-1] + 0.25 * spread)
    axes.set(xlabel="learning rate", ylabel=record.metric)
    axes.grid()
    axes.legend(handles=key, ncols=2 if svg.medium().narrow else 4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _ranks(page: Subject) -> Shown | None:
    record = audit_of(page.parts)
    patterns = [run.ranks for run in record.arms[0].runs if run.ranks is not None] if record.arms else []
    if not patterns or not record.layers:
        return None
    mean = [statistics.fmean(column) for column in zip(*patterns, strict=True)]
    table = grids.grid(grids.groups(record.layers), [round(value) for value in mean])
    rows = [
        [role, *(ABSENT if c is None else str(c) for c in cells), rank(average)]
        for role, cells, average in zip(table.roles, table.cells, table.row_means, strict=True)
    ]
    shown = Exhibit(
        "map", f"Where {record.method} put its ranks", lambda: figures_map.rank_map_figure(table),
        f"The mean rank of each layer over {plural(len(patterns), 'seed')}, rounded. Darker is higher (lighter in dark "
        "mode); a dashed cell is rank 0.", map_header(table), rows,
    )  # fmt: skip
    said = []
    alike = record.stability
    if alike.rank_correlation is not None:
        said.append(f"Mean Spearman correlation of the layers’ ranks between two seeds: {alike.rank_correlation:.2f}.")
    if alike.jaccard is not None:
        said.append(f"Mean share of rank units that two seeds have in common: {percent(alike.jaccard)} (Jaccard).")
    header = ["Layer", "Mean", "Lowest", "Highest"]
    spread = [
        [layer.name, rank(value), str(min(column)), str(max(column))]
        for layer, value, column in zip(record.layers, mean, zip(*patterns, strict=True), strict=True)
    ]
    return {"figures": [shown], "details": said, "header": header, "rows": spread, "names": 1}


def _made(page: Subject) -> Shown | None:
    record = audit_of(page.parts)
    return {"record": record, "seconds": duration(record.seconds)}


AUDIT_SECTIONS = (
    Section("answer", "Answer", "audit-answer.html.j2", _answer),
    Section("differences", "Differences", "audit-table.html.j2", _differences),
    Section("arms", "Arms", "audit-table.html.j2", _arms),
    Section("tuning", "Tuning", "audit-table.html.j2", _tuning),
    Section("ranks", "Ranks", "audit-table.html.j2", _ranks),
    Section("method", "How it was made", "audit-made.html.j2", _made),
)
