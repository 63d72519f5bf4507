"""What the report says first: one honest sentence, and what should make the reader wary."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from rankalloc.trace import EvaluationRecord, PairRecord, RankTrace, SweepRecord

from . import tables
from .sweeps import is_uniform
from .wording import count, fixed, number, percent, plural, some

LEAST_RATES = 3  # learning rates on either side of a comparison that calls itself tuned
SIZE_TOLERANCE = 0.02  # sizes closer than this share count as equal
MOVING_SHARE = 0.05  # more of the ranks than this changing layer at the last allocations is called moving


@dataclass(frozen=True)
class Verdict:
    """``sentence`` stands alone; ``notes`` say how far it carries. ``tone`` colours it."""

    sentence: str
    tone: Literal["better", "worse", "open"]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Alert:
    level: Literal["problem", "note"]
    text: str


def reached(trace: RankTrace) -> int:
    """What the final ranks spend, in the budget's unit."""
    return trace.allocations[-1].reached if trace.allocations else trace.budget.initial


def budget_state(trace: RankTrace) -> Literal["exact", "within", "over", "under"]:
    """Whether the target was met: exactly, to within one step of the cheapest layer, or not."""
    spent, target = reached(trace), trace.budget.target
    if spent == target:
        return "exact"
    if spent > target:
        return "over"
    costs = [tables.unit_cost(layer, trace.budget.unit) for layer in trace.layers]
    params = sum(c * r for c, r in zip(costs, trace.final_ranks, strict=True))
    per_unit = spent / params if trace.budget.unit == "bytes" and params else 1
    step = min(costs, default=1) * max(1, trace.budget.multiple_of) * per_unit
    return "within" if target - spent < step else "under"


def budget_phrase(trace: RankTrace) -> str:
    unit = {"ranks": "ranks", "params": "parameters", "bytes": "bytes"}[trace.budget.unit]
    amount = f"{count(reached(trace))} of {count(trace.budget.target)} {unit}"
    return {
        "exact": f"The budget was met exactly ({amount})",
        "within": f"The budget was met to within one rank of the cheapest layer ({amount})",
        "over": f"The budget was not met: {amount} are still in use",
        "under": f"The budget was not spent in full ({amount})",
    }[budget_state(trace)]


def judged(trace: RankTrace) -> EvaluationRecord | None:
    """The evaluation a verdict may speak of: the report split's, else the tuning split's, else the last."""
    last = trace.evaluations[-1] if trace.evaluations else None
    return trace.evaluation("report") or trace.evaluation("tune") or last


def headline_metric(record: EvaluationRecord, metric: str | None = None) -> tuple[str, float] | None:
    """The metric to speak of: the one asked for, else the first that is no loss, else the first."""
    if metric in record.metrics:
        return metric, record.metrics[metric]
    names = sorted(record.metrics, key=lambda name: "loss" in name)
    return (names[0], record.metrics[names[0]]) if names else None


def verdict(trace: RankTrace | None, sweep: SweepRecord | None) -> Verdict:
    if sweep is not None:
        return _pair_verdict(sweep, sweep.pair) if sweep.pair is not None else _sweep_verdict(sweep)
    if trace is None:
        raise ValueError("a verdict needs a trace or a sweep")
    return _run_verdict(trace)


def _run_verdict(trace: RankTrace) -> Verdict:
    parts = [budget_phrase(trace)]
    record = judged(trace)
    best = headline_metric(record) if record is not None else None
    if record is not None and best is not None:
        parts.append(
            f"{best[0]} is {number(best[1])} on the {record.split} split ({plural(record.examples, 'example')})"
        )
    else:
        parts.append("its quality was not measured")
    if "uniform" in trace.method:
        tail = (
            "every layer has the same rank, so this run is a control and says nothing about adaptive ranks on its own."
        )
    else:
        tail = "without a uniform control at equal budget, this run cannot say whether adaptive ranks helped."
    notes = [
        f"One training run{'' if trace.seed is None else f' (seed {trace.seed})'}: nothing here measures how much "
        "another seed would change it."
    ]
    row = next(
        (r for r in reversed(tables.evaluation_rows(trace)) if record is not None and r.split == record.split), None
    )
    if row is not None and row.standard_error is not None:
        notes.append(
            f"Mean example loss on the {row.split} split: {fixed(row.mean_loss)} ± {fixed(row.standard_error)} "
            "(standard error "
            f"over {plural(row.examples, 'example')})."
        )
    return Verdict(", and ".join(parts) + "; " + tail, "open", notes)


def _sweep_verdict(sweep: SweepRecord) -> Verdict:
    done = sum(t.state == "complete" for t in sweep.trials)
    if sweep.best is None:
        return Verdict(
            f"None of the {plural(len(sweep.trials), 'trial')} gave a result, so there is nothing to compare.", "open"
        )
    best = next((t for t in sweep.trials if t.number == sweep.best), None)
    kind = "uniform" if best is not None and is_uniform(best) else "adaptive"
    value = number(best.value) if best is not None else "unknown"
    return Verdict(
        f"The best of {plural(done, 'completed trial')} is number {sweep.best} ({kind}, {sweep.metric} {value}), "
        "but no adaptive "
        "and uniform trial were evaluated side by side on the report split, so this sweep cannot say whether "
        "adaptive ranks "
        "helped.",
        "open",
        ["The value is the best of many on the tuning split and is therefore flattering."],
    )


def _pair_verdict(sweep: SweepRecord, pair: PairRecord) -> Verdict:
    measured = (
        f"difference {fixed(pair.difference, signed=True)} in mean loss per example, 95\u00a0% interval "
        f"{fixed(pair.low, signed=True)} to {fixed(pair.high, signed=True)}, p\u00a0=\u00a0{number(pair.p_value, 2)}, "
        f"{plural(pair.examples, 'example')}"
    )
    if pair.low <= 0 <= pair.high:
        tone, sentence = "open", f"This data cannot tell adaptive ranks from uniform ones ({measured})."
    elif pair.high < 0:
        tone, sentence = (
            "better",
            (
                "Adaptive ranks did better than the best uniform ranks of no larger size on the report "
                f"split ({measured})."
            ),
        )
    else:
        tone, sentence = "worse", f"Uniform ranks won: adaptive ranks did worse on the report split ({measured})."
    notes = [
        "The difference is adaptive minus uniform, so a negative one speaks for adaptive ranks. It comes from a single "
        "training seed each, and the interval covers the data only: another seed may move it by more."
    ]
    one, other = pair.adaptive_metrics.get(pair.metric), pair.uniform_metrics.get(pair.metric)
    if one is not None and other is not None:
        notes.append(
            f"On the report split {pair.metric} is {number(one)} with adaptive ranks (trial {pair.adaptive}) and "
            f"{number(other)} with uniform ranks (trial {pair.uniform})."
        )
    sizes = {t.number: t.adapter_params for t in sweep.trials}
    a, u = sizes.get(pair.adaptive), sizes.get(pair.uniform)
    if a and u:
        gap = "the same size" if a == u else f"{percent(abs(a - u) / a)} {'smaller' if u < a else 'larger'}"
        notes.append(f"Adapter parameters: {count(a)} adaptive, {count(u)} uniform ({gap}).")
    notes.append(
        "This compares two recipes, each with settings of its own. It does not single out the placement of the ranks: "
        "for that, compare with the same method forced to equal ranks (placement=uniform)."
    )
    probe = _why_only_a_probe(sweep, pair)
    return Verdict(f"{sentence} Read it as a probe: {probe}." if probe else sentence, tone, notes)


def _why_only_a_probe(sweep: SweepRecord, pair: PairRecord) -> str:
    """What keeps this pair from being a tuned comparison at equal size: too few learning rates, a best one at the edge,
    or an adaptive run that holds more parameters."""
    tried: dict[str, set[float]] = {"adaptive": set(), "uniform": set()}
    best: dict[str, float] = {}
    for trial in sweep.trials:
        rate = trial.params.get("learning_rate")
        if trial.state == "complete" and isinstance(rate, int | float):
            tried["uniform" if is_uniform(trial) else "adaptive"].add(rate)
            for side, number_of in (("adaptive", pair.adaptive), ("uniform", pair.uniform)):
                if trial.number == number_of:
                    best[side] = rate
    reasons = []
    for side, rates in tried.items():
        if 0 < len(rates) < LEAST_RATES:
            reasons.append(
                f"{side} ranks were tried at {plural(len(rates), 'learning rate')}, and a tuned comparison takes "
                f"{LEAST_RATES} at least"
            )
        elif side in best and best[side] in (min(rates), max(rates)):
            edge = "lowest" if best[side] == min(rates) else "highest"
            reasons.append(f"{side} ranks did best at the {edge} learning rate they were tried at")
    sizes = {trial.number: trial.adapter_params for trial in sweep.trials}
    a, u = sizes.get(pair.adaptive), sizes.get(pair.uniform)
    if a and u and a > u * (1 + SIZE_TOLERANCE):
        reasons.append(
            f"the adaptive adapter holds {percent(a / u - 1)} more parameters than the uniform one, which a budget in "
            "parameters (budget: params) would not let it"
        )
    return "; ".join(reasons)


def moved_at_freeze(trace: RankTrace) -> tuple[int, int]:
    """(ranks that went to another layer at the last allocation or the one before, whichever is more;
    the total). A layer's gain counts: while the budget only falls, gains are moves."""
    last = [a.ranks for a in trace.allocations[-3:]]
    gains = [sum(max(0, b - a) for a, b in zip(old, new, strict=True)) for old, new in pairwise(last)]
    return max(gains, default=0), sum(trace.final_ranks)


def alerts(trace: RankTrace | None, sweep: SweepRecord | None) -> list[Alert]:
    made = []
    if sweep is not None:
        made += _sweep_alerts(sweep)
        if trace is None:
            made.append(Alert("problem", "No trace of the best trial is at hand, so this page shows the sweep only."))
    if trace is not None:
        made += _run_alerts(trace)
    return sorted(made, key=lambda alert: alert.level != "problem")


def _run_alerts(trace: RankTrace) -> list[Alert]:
    made = []
    if not trace.finished:
        made.append(
            Alert(
                "problem",
                f"The run is not finished: {count(trace.steps_done)} of "
                f"{plural(trace.budget.total_steps, 'step')} are done.",
            )
        )
    if budget_state(trace) in ("over", "under"):
        made.append(Alert("problem", budget_phrase(trace) + "."))
    moved, total = moved_at_freeze(trace)
    if total and moved > MOVING_SHARE * total:
        made.append(
            Alert(
                "problem",
                f"Ranks were still moving at the freeze: {count(moved)} of {count(total)} changed layer at "
                "one of the last two allocations. A later freeze may settle them.",
            )
        )
    if trace.nonfinite_steps:
        at = some([count(s) for s in trace.nonfinite_steps])
        made.append(
            Alert(
                "problem",
                f"{plural(len(trace.nonfinite_steps), 'step')} with a non-finite loss or gradient skipped (at {at}).",
            )
        )
    rows = tables.layer_rows(trace)
    zero = [row.name for row in rows if row.state == "zero"]
    if zero:
        made.append(Alert("note", f"{plural(len(zero), 'layer')} of {len(rows)} ended at rank 0: {some(zero)}."))
    capped = [row.name for row in rows if row.state == "cap"]
    if capped:
        made.append(
            Alert(
                "note",
                f"{plural(len(capped), 'layer')} of {len(rows)} ended at the largest rank allowed, and may "
                f"have wanted more: {some(capped)}.",
            )
        )
    return made + [Alert("problem", text) for text in trace.alerts]


def _sweep_alerts(sweep: SweepRecord) -> list[Alert]:
    made = []
    failed = [t for t in sweep.trials if t.state == "failed"]
    if failed:
        why = some([f"{t.number}" + (f" ({t.message})" if t.message else "") for t in failed])
        made.append(Alert("problem", f"{plural(len(failed), 'trial')} of {len(sweep.trials)} failed: {why}."))
    open_ = [t for t in sweep.trials if t.state in ("running", "waiting")]
    if open_:
        made.append(Alert("problem", f"The sweep is not finished: {plural(len(open_), 'trial')} still to come."))
    return made
