"""``audit --dry-run``: the arms, what they will cost, and how far the audit in the folder is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import RankallocError
from .output import about, count, say, show_json, show_table

if TYPE_CHECKING:
    from ..experiments.audits.progress import Progress
    from ..experiments.audits.running import Audit
    from ..experiments.sweeps.slots import Slots

PLAN_CHANGES = (
    "looks, margin or end were changed after seeds had been seen, so that a wrong claim is no longer bounded by 5 %"
)


def cost_of(planned: Audit) -> str:
    """What an audit will take, in words."""
    from ..experiments.audits.concluding import looks_of
    from ..experiments.audits.progress import most_runs, running_arms
    from ..experiments.runner import steps_of

    looks, arms, audit_section = looks_of(planned.config), running_arms(planned), planned.config.audit
    steps = steps_of(planned.config, planned.setting.prepared.train_examples or 0)
    most, fewest = most_runs(planned), len(arms) * (audit_section.trials + looks[0])
    return (
        f"{count(len(arms), 'arm')} of {planned.setting.params:,} parameters; {_between(fewest, most)} runs of "
        f"{steps} steps, {_between(fewest * steps, most * steps)} in all"
    )


def _between(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def told_before(planned: Audit, slots: Slots | None) -> tuple[list[str], list[str]]:
    """(notes, alerts) on an audit that is to begin, or to go on with ``slots``."""
    from ..audit_record import AuditRecord
    from ..experiments.audits.study import changes_plan

    notes, alerts = [], list(planned.alerts)
    if slots is not None:
        if changes_plan(slots, planned):
            alerts.append(PLAN_CHANGES)
        try:
            if planned.folder.record.exists():
                AuditRecord.load(planned.folder.record)
        except RankallocError as error:
            notes.append(f"{error}; it is written anew from {planned.storage}")
    return notes, alerts


def show_plan(planned: Audit, storage: str | None, refusal: str | None, as_json: bool) -> None:
    """Print it. ``refusal``: why the folder would be refused, or None."""
    from ..experiments.audits.concluding import looks_of
    from ..experiments.audits.progress import arm_text, progress_of
    from ..experiments.audits.study import begun, results_of

    slots: Slots | None = None
    try:
        slots = begun(planned, storage) if refusal is None else None
    except RankallocError as error:
        refusal = str(error)
    results = None if slots is None else results_of(slots)
    notes, alerts = told_before(planned, slots)
    far = None if results is None else progress_of(planned, results)
    looks = looks_of(planned.config)
    if as_json:
        return show_json({
            "params": planned.setting.params, "looks": looks, "cost": cost_of(planned),
            "arms": [{"name": arm.name, "what": arm.what, "skipped": arm.skipped} for arm in planned.arms],
            "so_far": None if far is None else {
                "done": far.done, "failed": far.failed, "left": [far.least, far.most], "seconds_left": far.seconds_left,
            },
            "alerts": alerts, "notes": notes, "note": refusal,
        })
    when = f"each of {looks[0]} to {looks[-1]}" if planned.config.audit.open_ended else ", ".join(map(str, looks))
    arms = []
    for arm in planned.arms:
        made = f"; {arm_text(planned, results, arm)}" if results and arm.skipped is None else ""
        arms.append((arm.name, (arm.what if arm.skipped is None else f"left out: {arm.skipped}") + made))
    rows = [
        ("audit", cost_of(planned)), ("metric", f"{planned.setting.prepared.metric}; a difference of "
         f"{planned.config.audit.margin:g} counts as none"),
        ("tuning", f"{count(planned.config.audit.trials, 'run')} an arm, on the tune split"),
        ("comparison", f"on the report split, after {when} paired seeds"), *arms,
        *([("so far", _so_far(far))] if far is not None else []),
        *(("alert", said) for said in alerts), *(("note", said) for said in notes),
        *([("note", f"a real run would be refused: {refusal}")] if refusal else []),
    ]  # fmt: skip
    show_table(rows)
    if refusal is None:
        what = "begin" if far is None else "go on" if far.least else "conclude it"
        say(f"nothing was written; run the same command without --dry-run to {what}")


def _so_far(far: Progress) -> str:
    failures = f" ({far.failed} with a failure)" if far.failed else ""
    if not far.most:
        return f"{count(far.done, 'run')} made{failures}, and none is left: it is over"
    time = ""
    if far.seconds_left is not None:
        low, high = (about(seconds) for seconds in far.seconds_left)
        time = f", about {low if low == high else f'{low} to {high}'} of training and evaluation over all processes"
    return f"{count(far.done, 'run')} made{failures}; {_between(far.least, far.most)} left{time}"
