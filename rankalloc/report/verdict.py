"""The report's first sentence: what the run or the sweep shows, and how far that carries."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

from ..trace import BASELINES, PairRecord, RankChoice, RankTrace, SweepRecord, TrialRecord
from .facts import Facts
from .outcome import budget_phrase, contradicts, headline_metric, judged
from .wording import Outcome, count, fixed, number, percent, plural

LEAST_RATES = 3  # learning rates tried on either side of a comparison that counts as tuned

KINDS: dict[RankChoice, str] = {
    "adaptive": "adaptive", "uniform": "uniform", "control": "a control", "given": "with given ranks",
}
PLACED = {
    "random": "the ranks were placed at random",
    "shuffled": "the ranks that the method chose went to other layers",
    "grouped": "all layers of a module type share one rank",
}
_CONTROL = "so this run is a control and says nothing about adaptive ranks on its own."


@dataclass(frozen=True)
class Verdict:
    """``sentence`` can be read alone; ``notes`` give its limits. ``outcome`` is what adaptive ranks did, or in a
    comparison of two results what the first did beside the second."""

    sentence: str
    outcome: Outcome
    notes: list[str] = field(default_factory=list)


def verdict(run: Facts | None, sweep: SweepRecord | None) -> Verdict:
    """The verdict on the sweep, or without one on the run."""
    if sweep is not None:
        return _pair_verdict(sweep, sweep.pair, run) if sweep.pair is not None else _sweep_verdict(sweep)
    if run is None:
        raise ValueError("a verdict needs a trace or a sweep")
    return _run_verdict(run)


def _run_verdict(run: Facts) -> Verdict:
    trace = run.trace
    parts = [budget_phrase(trace)]
    record = judged(trace)
    best = headline_metric(record) if record is not None else None
    if record is not None and best is not None:
        parts.append(
            f"{best[0]} is {number(best[1])} on the {record.split} split ({plural(record.examples, 'example')})"
        )
    else:
        parts.append("its quality was not measured")
    notes = [
        f"One training run{'' if trace.seed is None else f' (seed {trace.seed})'}: nothing here measures how much "
        "another seed would change it."
    ]
    row = next((r for r in reversed(run.evaluations) if record is not None and r.split == record.split), None)
    if row is not None and row.standard_error is not None:
        notes.append(
            f"Mean example loss on the {row.split} split: {fixed(row.mean_loss)} ± {fixed(row.standard_error)} "
            f"(standard error over {plural(row.examples, 'example')})."
        )
    return Verdict(", and ".join(parts) + "; " + _evidence(trace), "cannot tell", notes)


def _evidence(trace: RankTrace) -> str:
    """What this run alone says about adaptive ranks: nothing, for a reason that depends on how it chose its own."""
    if trace.rank_choice == "uniform":
        return f"every layer has the same rank, {_CONTROL}"
    if trace.method in BASELINES:
        return f"{trace.method} adapters have no ranks, {_CONTROL}"
    if trace.rank_choice == "control":
        placement = str(trace.method_options.get("placement"))
        return f"{PLACED.get(placement, f'the ranks were placed by {placement!r}')}, {_CONTROL}"
    if trace.rank_choice == "given":
        return (
            "its ranks were given before training and depend on neither data nor training, so this run says nothing "
            "about adaptive ranks."
        )
    return (
        "without a uniform control at equal budget, this run cannot say whether adaptive ranks helped: rankalloc audit "
        "with its configuration tells, and rankalloc report --compare sets another run beside it."
    )


def _sweep_verdict(sweep: SweepRecord) -> Verdict:
    done = [t for t in sweep.trials if t.state == "complete"]
    if sweep.best is None:
        return Verdict(
            f"None of the {plural(len(sweep.trials), 'trial')} gave a result, so there is nothing to compare.",
            "cannot tell",
        )
    best = next((t for t in sweep.trials if t.number == sweep.best), None)
    kind = KINDS["adaptive" if best is None else sweep.rank_choice(best)]
    value = number(best.value) if best is not None else "unknown"
    notes = _fresh_notes(best) or ["The value is the best of many on the tuning split and is therefore flattering."]
    if done and all(sweep.rank_choice(t) != "adaptive" for t in done):
        notes.append("No completed trial chose its ranks adaptively.")
    return Verdict(
        f"The best of {plural(len(done), 'completed trial')} is number {sweep.best} ({kind}, {sweep.metric} {value}), "
        "but no adaptive and uniform trial were evaluated side by side on the report split, so this sweep cannot say "
        "whether adaptive ranks helped.",
        "cannot tell",
        notes,
    )


def _fresh_notes(best: TrialRecord | None) -> list[str]:
    """What the winner came to with fresh seeds; nothing where there are none."""
    if best is None or not best.fresh:
        return []
    return [
        f"The best trial, {best.number}, won among the best few by its mean over fresh seeds ({len(best.fresh)}): "
        f"{number(fmean(best.fresh))}, beside {number(best.value)} with the seed it was found by."
    ]


def _pair_verdict(sweep: SweepRecord, pair: PairRecord, run: Facts | None) -> Verdict:
    measured = (
        f"difference {fixed(pair.difference, signed=True)} in mean loss per example, 95\u00a0% interval "
        f"{fixed(pair.low, signed=True)} to {fixed(pair.high, signed=True)}, p\u00a0=\u00a0{number(pair.p_value, 2)}, "
        f"{plural(pair.examples, 'example')}"
    )
    a, u = _sizes(sweep, pair)
    larger = a is not None and u is not None and a - u > _rank_cost(sweep, pair, run)
    smaller = a is not None and u is not None and u - a > _rank_cost(sweep, pair, run)
    outcome: Outcome
    if pair.low <= 0 <= pair.high:
        outcome, sentence = "cannot tell", f"This data cannot tell adaptive ranks from uniform ones ({measured})."
    elif pair.high < 0:
        whom = "" if larger or smaller else " of the same size" if a == u else " of no larger size"
        outcome = "cannot tell" if larger else "helped"
        sentence = f"Adaptive ranks did better than the best uniform ranks{whom} on the report split ({measured})."
    else:
        outcome = "cannot tell" if smaller else "hurt"
        sentence = f"Uniform ranks won: adaptive ranks did worse on the report split ({measured})."
    one, other = pair.adaptive_metrics.get(pair.metric), pair.uniform_metrics.get(pair.metric)
    raised = sweep.direction == "maximize" if pair.metric == sweep.metric else None
    if not pair.low <= 0 <= pair.high and contradicts(pair.metric, one, other, pair.difference, raised):
        outcome = "cannot tell"
        sentence += f" That is by loss; {pair.metric} says the opposite, {number(one)} against {number(other)}."
    if a and u and (larger or smaller):
        sentence = (
            f"Not like with like: the adaptive adapter is {percent(abs(a / u - 1))} "
            f"{'larger' if larger else 'smaller'} than the uniform one ({count(a)} against {count(u)} parameters). "
            f"{sentence}"
        )
    notes = [
        "The difference is adaptive minus uniform, so a negative one speaks for adaptive ranks. It comes from a single "
        "training seed each, and the interval covers the data only: another seed may move it by more."
    ]
    if one is not None and other is not None:
        notes.append(
            f"On the report split {pair.metric} is {number(one)} with adaptive ranks (trial {pair.adaptive}) and "
            f"{number(other)} with uniform ranks (trial {pair.uniform})."
        )
    if a and u:
        gap = "the same size" if a == u else f"{percent(abs(a - u) / a)} {'smaller' if u < a else 'larger'}"
        notes.append(f"Adapter parameters: {count(a)} adaptive, {count(u)} uniform ({gap}).")
    notes += _matched(sweep, pair) if larger or smaller else []
    notes.append(
        "This compares two recipes, each with settings of its own. It does not single out the placement of the ranks: "
        "for that, compare with the same method forced to equal ranks (placement=uniform)."
    )
    notes += _fresh_notes(next((trial for trial in sweep.trials if trial.number == sweep.best), None))
    probe = _why_only_a_probe(sweep, pair, {"helped": "adaptive", "hurt": "uniform"}.get(outcome))
    return Verdict(f"{sentence} Read it as a probe: {probe}." if probe else sentence, outcome, notes)


def _sizes(sweep: SweepRecord, pair: PairRecord) -> tuple[int | None, int | None]:
    """Adapter parameters of the pair, the adaptive one's first."""
    sizes = {trial.number: trial.adapter_params for trial in sweep.trials}
    return sizes.get(pair.adaptive), sizes.get(pair.uniform)


def _rank_cost(sweep: SweepRecord, pair: PairRecord, run: Facts | None) -> float:
    """Parameters of one rank: of the costliest layer, or on average where no trace is at hand."""
    if run is not None and run.trace.layers:
        return max(layer.d_in + layer.d_out for layer in run.trace.layers)
    trial = next((trial for trial in sweep.trials if trial.number == pair.adaptive), None)
    return trial.adapter_params / trial.ranks if trial is not None and trial.adapter_params and trial.ranks else 0.0


def _matched(sweep: SweepRecord, pair: PairRecord) -> list[str]:
    """What the uniform trial of the adaptive one's own size came to, on the split that choices were made on."""
    mine = next((trial for trial in sweep.trials if trial.number == pair.adaptive), None)
    control = next((t for t in sweep.trials if t.role == "matched control" and t.value is not None), None)
    if mine is None or control is None or control.number == pair.uniform:
        return []
    return [
        f"At equal size, on the tuning split: {sweep.metric} is {number(mine.value)} with adaptive ranks (trial "
        f"{mine.number}, {count(mine.adapter_params)} parameters) and {number(control.value)} with the matched control "
        f"(trial {control.number}, {count(control.adapter_params)} parameters)."
    ]


def _why_only_a_probe(sweep: SweepRecord, pair: PairRecord, winner: str | None) -> str:
    """Why this pair is no tuned comparison: too few learning rates, or a best one at the edge. Empty when it is one,
    and where only the side that won was tuned too little: more rates would not have made it worse."""
    tried: dict[RankChoice, set[float]] = {"adaptive": set(), "uniform": set()}
    best: dict[RankChoice, float] = {}
    in_pair: dict[int, RankChoice] = {pair.adaptive: "adaptive", pair.uniform: "uniform"}
    for trial in sweep.trials:
        rate = trial.params.get("learning_rate")
        if trial.state == "complete" and isinstance(rate, int | float):
            choice = sweep.rank_choice(trial)
            if choice in tried:
                tried[choice].add(rate)
            if trial.number in in_pair:
                best[in_pair[trial.number]] = rate
    reasons = []
    for side, rates in tried.items():
        if side == winner:
            continue
        if 0 < len(rates) < LEAST_RATES:
            reasons.append(
                f"{side} ranks were tried at {plural(len(rates), 'learning rate')}, and a tuned comparison takes "
                f"{LEAST_RATES} at least (rankalloc audit makes one)"
            )
        elif rates and side in best and best[side] in (min(rates), max(rates)):
            edge = "lowest" if best[side] == min(rates) else "highest"
            reasons.append(f"{side} ranks did best at the {edge} learning rate they were tried at")
    return "; ".join(reasons)
