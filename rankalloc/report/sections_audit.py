"""The sections of an audit's page: the answer, the differences, the runs, the tuning, and where the ranks went."""

from __future__ import annotations

import statistics

from ..audit_record import ArmRecord, AuditRecord
from . import figures_audit, figures_map, grids
from .audited import audit_of, difference, outcome_of, sentence_of, unit
from .exhibit import Exhibit
from .exhibits import map_header
from .facts import Subject
from .following import after_audit
from .section import Section, Shown
from .wording import ABSENT, count, duration, fixed, number, percent, plural, rank, rate

_CLAIMS = {"better": "the method is better", "worse": "the method is worse", "equivalent": "equivalent",
           "undecided": "undecided"}  # fmt: skip


def _answer(page: Subject) -> Shown | None:
    record = audit_of(page.parts)
    return {
        "record": record, "sentence": sentence_of(record), "outcome": outcome_of(record),
        "steps": after_audit(record), "alerts": [*record.alerts, *page.notes],
        "ran": [arm for arm in record.arms if arm.skipped is None],
        "left_out": [arm for arm in record.arms if arm.skipped is not None],
    }


def _differences(page: Subject) -> Shown | None:
    record = audit_of(page.parts)
    if not record.comparisons:
        return None
    header, rows = difference_rows(record)
    what = record.metric if unit(record.metric).startswith("in") else unit(record.metric)
    cut = " An arrow: the interval goes on beyond the axis." if figures_audit.is_cut(record) else ""
    forest = Exhibit(
        "forest", f"What {record.method} gains over each arm", lambda: figures_audit.forest_figure(record),
        f"The difference {what} on the report split, mean over {plural(record.seeds, 'paired seed')}; to the right the "
        "audited method is better. The thick line is the 90 % interval of the test, which holds over all looks; the "
        "thin one also holds the choice of examples. A hollow mark: nothing is shown. The band is the margin within "
        f"which arms count as equivalent.{cut}", header, rows, names=2,
    )  # fmt: skip
    return {"figures": [forest], "details": record.details, "header": header, "rows": rows, "names": 2}


def difference_rows(record: AuditRecord) -> tuple[list[str], list[list[str]]]:
    """The header and a row for each arm that the method was compared with."""
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
    return header, rows


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
        "seeds", f"{record.metric} of every arm, by seed", lambda: figures_audit.strip_figure(record, arms),
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
    chosen = rate(arm.rate) + (" (an edge)" if arm.at_edge else "")
    return [
        arm.name, arm.what, fixed(value), fixed(loss), count(max(sizes)) if sizes else ABSENT,
        count(max(peaks)) if peaks else ABSENT, chosen, number(steps), ABSENT if seconds is None else f"{seconds:.0f}",
    ]


def _tuning(page: Subject) -> Shown | None:
    record = audit_of(page.parts)
    arms = [arm for arm in record.arms if arm.tried]
    if not arms:
        return None
    rows = [
        [arm.name, rate(one.rate) + (" *" if one.rate == arm.rate else ""), fixed(one.value)]
        for arm in arms for one in sorted(arm.tried, key=lambda one: one.rate)
    ]
    shown = Exhibit(
        "tuning", "How the arms were tuned", lambda: figures_audit.tuning_figure(record, arms),
        f"{record.metric} on the tune split against the learning rate, one run each. The chosen rate of each arm is "
        f"marked; in the numbers it has a star.{_left_out(record, arms)}",
        ["Arm", "Learning rate", f"{record.metric} on the tune split"], rows,
    )  # fmt: skip
    return {"figures": [shown], "details": [], "header": [], "rows": [], "names": 1}


def _left_out(record: AuditRecord, arms: list[ArmRecord]) -> str:
    """What the axis of the tuning figure does not reach, in words."""
    values = figures_audit.outside(record, arms)
    if not values:
        return ""
    ends = fixed(values[0]) if len(values) == 1 else f"{fixed(values[0])} to {fixed(values[-1])}"
    return f" A triangle at the edge: outside the axis, and in the numbers only ({plural(len(values), 'run')}, {ends})."


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
