"""What an audit found, in words: one sentence, a few that add to it, and what to do next.

Each limit of an interval is wrong with a chance of at most 5 % over all looks together, so that the interval is one of
90 %: the one that goes with a test in one direction, and with two one-sided tests of equivalence.
"""

from __future__ import annotations

import statistics

from ...audit_record import AuditRecord, ComparisonRecord, Next
from ...report.audited import difference, limits, unit
from ..audit_arms import UNIFORM


def sentence_of(record: AuditRecord) -> str:
    """The answer, with its uncertainty and what it is owed to, and whether it can be relied on."""
    edges = [name for name in (record.method, UNIFORM) if record.arm(name).at_edge]
    probe = f" Read it as a probe: {_listed(edges)} may not be tuned yet, the best rate is at an edge." if edges else ""
    return _answer_of(record) + probe


def no_answer_of(record: AuditRecord) -> str | None:
    """Why the method and uniform LoRA cannot be compared; None where they are, or where nothing is known against it."""
    if record.comparison(UNIFORM) is not None:
        return None
    for arm in record.arms[:2]:
        lost = next((run for run in arm.runs if run.message is not None), None)
        if arm.skipped is not None or lost is not None:
            why = arm.skipped if lost is None else f"it failed on seed {lost.seed}: {lost.message}"
            return f"{arm.name} cannot be compared: {why}"
    return None


def _answer_of(record: AuditRecord) -> str:
    main = record.comparison(UNIFORM)
    assert main is not None, "an audit has uniform LoRA"
    metric = record.metric
    size = f"At {record.params:,} parameters"
    between = f"{limits(main, metric)}, {main.seeds} seeds"
    if main.claim == "better":
        return (
            f"{size} {record.method} gains {difference(main.mean, metric)} {unit(metric)} over tuned uniform LoRA "
            f"({between}){_owed_to(record, main)}"
        )
    if main.claim == "worse":
        return (
            f"{size} {record.method} loses {difference(-main.mean, metric)} {unit(metric)} against tuned uniform LoRA "
            f"({between})."
        )
    if main.claim == "equivalent":
        return (
            f"{size} {record.method} and tuned uniform LoRA are equivalent: they differ by less than "
            f"{difference(record.margin, metric)} {unit(metric)} ({between})."
        )
    return (
        f"{size} no gain of {record.method} over tuned uniform LoRA is shown, nor that the two are equivalent: "
        f"{difference(main.mean, metric, True)} {unit(metric)} ({between})."
    )


def _owed_to(record: AuditRecord, main: ComparisonRecord) -> str:
    """Whether the gain is the placement's or the parametrisation's, by the twin."""
    twin = record.comparison("twin")
    if twin is None:
        return "."
    gain = difference(main.mean - twin.mean, record.metric)
    if twin.claim == "better":
        return f"; its twin with equal ranks gains {gain}, so the placement has a part in it."
    if twin.claim == "worse":
        return f"; its twin with equal ranks gains {gain}, so equal ranks are the better ones."
    if twin.claim == "equivalent":
        return f"; its twin with equal ranks gains {gain}, so it is the parametrisation and not the placement."
    return f"; its twin with equal ranks gains {gain}, so that the placement has a part in it is not shown."


def details_of(record: AuditRecord) -> list[str]:
    """What else the comparisons show, a sentence each."""
    found, metric = [], record.metric
    said = {"better": "is better than", "worse": "is worse than", "equivalent": "is equivalent to"}
    for one in record.comparisons:
        if one.arm not in (UNIFORM, "twin") and one.claim in said:
            found.append(
                f"{record.method} {said[one.claim]} {one.arm}: {difference(one.mean, metric, True)} {unit(metric)} "
                f"({limits(one, metric)})."
            )
    undecided = [one.arm for one in record.comparisons if one.arm != UNIFORM and one.claim == "undecided"]
    main = record.comparison(UNIFORM)
    if undecided and main is not None and main.claim in ("better", "worse"):
        found.append(f"Against {_listed(undecided)} nothing is shown.")
    elif undecided:
        found.append(
            f"Of {_listed(undecided)} no difference is claimed: they wait for the comparison with uniform LoRA "
            "(the table has their differences)."
        )
    related, overlap = record.stability.rank_correlation, record.stability.jaccard
    if related is not None and overlap is not None:
        found.append(
            f"From seed to seed the ranks of the layers correlate by {related:.2f} (Spearman), and {overlap:.0%} of "
            "the rank units are the same."
        )
    return found


def advice_of(record: AuditRecord) -> tuple[Next, str | None, str]:
    """What to do next: what kind of thing, the arm that it is about, and the sentence."""
    main = record.comparison(UNIFORM)
    assert main is not None, "an audit has uniform LoRA"
    if main.claim in ("better", "equivalent"):
        beaten_by = [
            one.arm for one in record.comparisons
            if one.claim == "worse" and one.arm != UNIFORM and record.arm(one.arm).command is not None
        ]
        if beaten_by:
            arm = min(beaten_by, key=lambda name: _mean(record, name))
            return "other arm", arm, f"Use {record.arm(arm).what}: it is better than {record.method} on this task."
    if main.claim == "better":
        twin = record.comparison("twin")
        if twin is not None and twin.claim == "equivalent":
            return "other arm", "twin", (
                f"Use {record.method}'s training with equal ranks: as good, and every tool reads equal ranks."
            )
        return "method", record.method, f"Use {record.method}."
    if main.claim == "undecided":
        return "more seeds", UNIFORM, (
            "Use tuned uniform LoRA, which is simpler, unless a new audit that plans for more seeds (audit.looks, or "
            "audit.open_ended) shows a difference."
        )
    return "uniform", UNIFORM, "Use tuned uniform LoRA, which is simpler."


def _mean(record: AuditRecord, arm: str) -> float:
    """The method's advantage over an arm."""
    found = record.comparison(arm)
    return 0.0 if found is None else statistics.fmean(found.differences)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
