"""What should make the reader of a report wary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..trace import BASELINES, RankTrace, SweepRecord
from .audited import audit_of
from .facts import Facts, Subject
from .outcome import budget_phrase, budget_state, moved_at_freeze
from .sweeps import to_come
from .wording import count, plural, some

MOVING_SHARE = 0.05  # ranks count as still moving when more than this share of them changed layer


@dataclass(frozen=True)
class Alert:
    level: Literal["problem", "note"]
    text: str


def alerts(run: Facts | None, sweep: SweepRecord | None, unread: Sequence[str] = ()) -> list[Alert]:
    """All alerts of a page, problems first; ``unread`` says what could not be read of its records."""
    made = [Alert("problem", text) for text in unread]
    if sweep is not None:
        made += _sweep_alerts(sweep)
        if run is None:
            made.append(Alert("problem", "No trace of the best trial is at hand, so this page shows the sweep only."))
    if run is not None:
        made += _run_alerts(run)
    return sorted(made, key=lambda alert: alert.level != "problem")


def alerts_of(page: Subject) -> list[Alert]:
    """The alerts of a page of any kind; of two side by side, those of each, with its name before them."""
    if page.other is None:
        return _alone(page)
    names = page.comparison.names if page.comparison is not None else (page.place, page.other.place)
    made = [
        replace(alert, text=f"{name}: {alert.text}")
        for name, side in zip(names, (page, page.other), strict=True) for alert in _alone(side)
    ]
    return sorted(made, key=lambda alert: alert.level != "problem")


def _alone(page: Subject) -> list[Alert]:
    said = audit_of(page.parts).alerts if "audit" in page.parts else []
    said += page.parts["check"].get("alerts", []) if "check" in page.parts else []
    return [*alerts(page.run, page.sweep, page.notes), *(Alert("note", str(text)) for text in said)]


def _run_alerts(run: Facts) -> list[Alert]:
    trace, made = run.trace, []
    if not trace.finished:
        steps = plural(trace.budget.total_steps, "step")
        made.append(Alert("problem", f"The run is not finished: {count(trace.steps_done)} of {steps} are done."))
    if budget_state(trace) in ("over", "under"):
        made.append(Alert("problem", budget_phrase(trace) + "."))
    moved, total = moved_at_freeze(trace)
    if total and moved > MOVING_SHARE * total:
        made.append(Alert(
            "problem",
            f"Ranks were still moving at the freeze: {count(moved)} of {count(total)} changed layer at one of the last "
            "two allocations. A later freeze may settle them.",
        ))
    made += _learned_nothing(trace)
    if trace.nonfinite_steps:
        at = some([count(s) for s in trace.nonfinite_steps])
        steps = plural(len(trace.nonfinite_steps), "step")
        made.append(Alert("problem", f"{steps} with a non-finite loss or gradient skipped (at {at})."))
    placed = [] if trace.method in BASELINES else run.layers  # what has no ranks misses none
    zero, capped = ([row.name for row in placed if row.state == state] for state in ("zero", "cap"))
    if zero:
        made.append(Alert("note", f"{plural(len(zero), 'layer')} of {len(run.layers)} ended at rank 0: {some(zero)}."))
    if capped and trace.rank_choice == "adaptive":
        made.append(Alert(
            "note",
            f"{plural(len(capped), 'layer')} of {len(run.layers)} ended at the largest rank allowed, and may have "
            f"wanted more: {some(capped)}.",
        ))
    made += [Alert("note", text) for text in trace.notes]
    return made + [Alert("problem", text) for text in trace.alerts]


def _learned_nothing(trace: RankTrace) -> list[Alert]:
    """A metric of exactly zero: every class but the most frequent one, say, is missed."""
    zero = {name: row.split for row in trace.evaluations for name, value in row.metrics.items()
            if name in ("f1", "accuracy", "token_accuracy") and value == 0}  # fmt: skip
    return [Alert(
        "problem",
        f"{name} on the {split} split is 0: the run has not learned its task, so it is no control either; try another "
        "learning rate, or more steps.",
    ) for name, split in zero.items()]  # fmt: skip


def _sweep_alerts(sweep: SweepRecord) -> list[Alert]:
    made = []
    failed = [t for t in sweep.trials if t.state == "failed"]
    if failed:
        why = some([f"{t.number}" + (f" ({t.message})" if t.message else "") for t in failed])
        made.append(Alert("problem", f"{plural(len(failed), 'trial')} of {len(sweep.trials)} failed: {why}."))
    unfinished = to_come(sweep)
    if unfinished:
        made.append(Alert("problem", f"The sweep is not finished: {plural(unfinished, 'trial')} still to come."))
    return made
