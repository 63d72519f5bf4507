"""The figures of an audit: gains, runs, tuning. What lies outside an axis is marked at its edge."""

from __future__ import annotations

import statistics
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..audit_record import ArmRecord, AuditRecord
from . import colours, figures_map, svg
from .audited import difference, unit
from .audited import limits as limits_of
from .wording import number


def forest_figure(record: AuditRecord) -> Figure:
    """The gains over the arms, with their intervals; an arrow where one goes on beyond the axis."""
    ones = list(reversed(record.comparisons))
    left, right = reach(record)
    figure = svg.canvas(0.9 + 0.34 * len(ones))
    axes = figure.add_subplot()
    axes.axvspan(-record.margin, record.margin, color=colours.GHOST, zorder=0)
    axes.axvline(0, color=colours.MUTED, linewidth=0.9, zorder=1)
    for line, one in enumerate(ones):
        color = {"better": colours.ADAPTIVE, "worse": colours.UNIFORM}.get(one.claim, colours.MUTED)
        for low, high, width in ((one.both_low, one.both_high, 0.9), (one.low, one.high, 2.4)):
            if low is not None and high is not None:
                axes.plot([low, high], [line, line], color=color, linewidth=width, solid_capstyle="butt", zorder=2)
                if low < left:
                    axes.plot(left, line, "<", color=color, markersize=6, clip_on=False, zorder=4)
                if high > right:
                    axes.plot(right, line, ">", color=color, markersize=6, clip_on=False, zorder=4)
        hollow = one.claim == "undecided"
        axes.plot(one.mean, line, "o", color=color, markersize=6, mfc=colours.SURFACE if hollow else color, zorder=3)
    svg.tips(axes, (
        (one.mean, line, f"over {one.arm}: {difference(one.mean, record.metric, True)} {unit(record.metric)} "
                         f"({limits_of(one, record.metric)})") for line, one in enumerate(ones)
    ))  # fmt: skip
    axes.set_yticks(range(len(ones)), [figures_map.shorten(one.arm, 24) for one in ones])
    axes.set(xlabel=f"gain of {record.method} in {record.metric}", ylim=(-0.6, len(ones) - 0.4))
    axes.set_xlim(left, right)
    axes.grid(axis="x")
    return figure


def reach(record: AuditRecord) -> tuple[float, float]:
    """Ends of the axis. An interval of few seeds may be far longer than all differences: it is cut off then."""
    ones = record.comparisons
    means = [abs(one.mean) for one in ones]
    known = sorted(abs(end) for one in ones for end in (one.low, one.high) if end is not None)
    most = max([*means, record.margin, known[int(0.8 * (len(known) - 1))] if known else 0.0]) * 1.15
    lows = [end for one in ones for end in (one.low, one.both_low, one.mean) if end is not None]
    highs = [end for one in ones for end in (one.high, one.both_high, one.mean) if end is not None]
    return max(-most * 2, min([*lows, -record.margin]) * 1.08), min(most * 2, max([*highs, record.margin]) * 1.08)


def is_cut(record: AuditRecord) -> bool:
    """Whether an interval goes on beyond the axis."""
    left, right = reach(record)
    ends = [end for one in record.comparisons for end in (one.low, one.high, one.both_low, one.both_high)]
    return any(end is not None and not left <= end <= right for end in ends)


def strip_figure(record: AuditRecord, arms: list[ArmRecord]) -> Figure:
    """The metric of each run, an arm beside the other."""
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
        svg.tips(axes, (
            (place, run.value, f"{arm.name}, seed {run.seed}: {number(run.value)}")
            for run in arm.runs if run.value is not None
        ))  # fmt: skip
    slanted = svg.medium().narrow or len(arms) > 9
    axes.set_xticks(
        range(len(arms)), [figures_map.shorten(arm.name, 16) for arm in arms], rotation=30 if slanted else 0,
        ha="right" if slanted else "center",
    )
    axes.set_ylabel(record.metric)
    axes.grid(axis="y")
    return figure


def tuning_figure(record: AuditRecord, arms: list[ArmRecord]) -> Figure:
    """The metric over the learning rate, a line an arm; a triangle at the edge for a value outside the axis."""
    figure = svg.canvas(3.6)
    axes = figure.add_subplot()
    key, drawn, rates = [], [], [one.rate for arm in arms for one in arm.tried]
    styles: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
    for place, arm in enumerate(arms):
        done = [(one.rate, one.value) for one in sorted(arm.tried, key=lambda one: one.rate) if one.value is not None]
        if not done:
            continue
        color = colours.LINES[place % len(colours.LINES)]
        style = styles[place // len(colours.LINES) % len(styles)]
        drawn += [(rate, value, color, arm.name) for rate, value in done]
        axes.plot(*zip(*done, strict=True), style, color=color, linewidth=1.5, marker="o", markersize=2.5)
        best = next((value for rate, value in done if rate == arm.rate), None)
        if best is not None and arm.rate is not None:
            axes.plot(arm.rate, best, "o", color=color, markersize=6.5)
        key.append(Line2D([], [], color=color, linestyle=style, label=figures_map.shorten(arm.name, 20)))
    svg.logarithmic(axes, "x", min(rates) / 1.25, max(rates) * 1.25)
    low, high = limits(record, arms)
    if low is not None and high is not None:
        axes.set_ylim(low, high)
        for rate, value, color, _ in drawn:
            if not low <= value <= high:
                axes.plot(rate, min(max(value, low), high), "v" if value < low else "^", color=color, markersize=7,
                          clip_on=False, zorder=4)
    bottom, top = axes.get_ylim()
    svg.tips(axes, (
        (rate, min(max(value, bottom), top), f"{name}, {rate:g}: {number(value)}") for rate, value, _, name in drawn
    ))  # fmt: skip
    axes.set(xlabel="learning rate", ylabel=record.metric)
    axes.grid()
    axes.legend(handles=key, ncols=2 if svg.medium().narrow else 4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def limits(record: AuditRecord, arms: list[ArmRecord]) -> tuple[float, float] | tuple[None, None]:
    """Ends of the tuning figure's axis, where a rate at which nothing is learnt would flatten all else."""
    sign = 1 if record.direction == "maximize" else -1
    values = sorted(sign * one.value for arm in arms for one in arm.tried if one.value is not None)
    if len(values) <= 4:
        return None, None
    middle, spread = values[len(values) // 2], max(values[-1] - values[len(values) // 4], 1e-9)
    ends = (max(values[0] - 0.1 * spread, middle - 2 * spread), values[-1] + 0.25 * spread)
    return min(sign * end for end in ends), max(sign * end for end in ends)


def outside(record: AuditRecord, arms: list[ArmRecord]) -> list[float]:
    """The values that the tuning figure's axis leaves out, in order."""
    low, high = limits(record, arms)
    if low is None or high is None:
        return []
    values = (one.value for arm in arms for one in arm.tried)
    return sorted(value for value in values if value is not None and not low <= value <= high)
