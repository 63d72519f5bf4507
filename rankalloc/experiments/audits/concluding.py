"""From the runs of an audit to its record: comparisons, how stable the pattern is, and what to do next."""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from ...audit_record import ArmRecord, ArmRun, AuditRecord, ComparisonRecord, StabilityRecord
from ...layer_names import places
from ...trace import LayerRecord
from ...training.environment import describe
from ..audit_arms import UNIFORM
from ..config import RunConfig
from ..sweeps.trial_runs import train_command
from .arms import Arm
from .cells import FOLDER, Cell, Result, Results, chosen_rate, complete, failed, folder_before, seed_of, tried
from .examples import example_interval
from .judgements import Design, Judgement, judge
from .judgements import is_over as all_judged
from .running import Audit
from .tuning import at_edge
from .wording import advice_of, details_of, no_answer_of, sentence_of


def design_of(config: RunConfig) -> Design:
    """How the audit of a configuration is judged."""
    audit = config.audit
    return Design(tuple(audit.looks), margin=audit.margin, open_ended=audit.open_ended)


def looks_of(config: RunConfig) -> list[int]:
    """The numbers of seeds at which an audit may end."""
    return list(range(2, config.audit.seeds_at_most + 1)) if config.audit.open_ended else list(config.audit.looks)


def is_over(audit: Audit, results: Results, seeds: int) -> bool:
    """Whether nothing waits for more seeds than these, all of which have been run."""
    judged = judged_at(audit, results, seeds)
    return not judged or all_judged(judged)


def seeds_by_now(audit: Audit, results: Results) -> int:
    """The number of seeds at the look that is being come to, or at the one where the audit ended."""
    for seeds in looks_of(audit.config):
        if not complete(audit.arms, results, audit.setting, seeds) or is_over(audit, results, seeds):
            return seeds
    return looks_of(audit.config)[-1]


def judged_at(audit: Audit, results: Results, seeds: int) -> dict[str, Judgement]:
    """{arm: the method against it} at a look; nothing where the method or uniform LoRA lacks a seed."""
    found = {
        arm.name: _differences(audit, results, place, seeds)
        for place, arm in enumerate(audit.arms) if place > 0 and arm.skipped is None
    }
    full = {name: values for name, values in found.items() if len(values) == seeds}
    return judge(full, design_of(audit.config), UNIFORM) if UNIFORM in full else {}


def _differences(audit: Audit, results: Results, place: int, seeds: int) -> list[float]:
    """The method less an arm, by seed, positive where the method is better."""
    sign = 1 if audit.setting.prepared.direction == "maximize" else -1
    pairs = [
        (results.get(Cell(0, "seed", index)), results.get(Cell(place, "seed", index))) for index in range(seeds)
    ]
    return [
        sign * (own.value - other.value) for own, other in pairs
        if own is not None and other is not None and own.value is not None and other.value is not None
    ]


def audit_record(
    audit: Audit, results: Results, finished: bool = False, changed: dict[str, Any] | None = None
) -> AuditRecord:
    """The audit as it is with these results: its answer, once it is ``finished``. ``changed`` is the plan that it began
    with, where another one was made after seeds had been seen."""
    setting, config = audit.setting, audit.config
    seeds = max((n for n in looks_of(config) if complete(audit.arms, results, setting, n)), default=0)
    judged = judged_at(audit, results, seeds) if seeds else {}
    arms = [_arm(audit, results, place, arm) for place, arm in enumerate(audit.arms)]
    layers = [
        LayerRecord(name=shape.name, kind="", block=block, role=role, d_in=shape.d_in, d_out=shape.d_out,
                    initial_rank=shape.rank)
        for shape, (block, role) in zip(setting.shapes, places([s.name for s in setting.shapes]), strict=True)
    ]
    record = AuditRecord(
        name=config.name, task=setting.prepared.name, model=setting.prepared.model_name,
        metric=setting.prepared.metric, direction=setting.prepared.direction, method=config.method,
        params=setting.params, layers=layers, margin=config.audit.margin, looks=looks_of(config),
        open_ended=config.audit.open_ended, seeds=seeds, arms=arms,
        comparisons=[_comparison(audit, results, name, one) for name, one in judged.items()],
        stability=stability([run.ranks for run in arms[0].runs if run.ranks is not None]),
        examples=next((r.attrs["examples"] for r in results.values() if "examples" in r.attrs), None),
        steps=sum(int(r.attrs.get("steps") or 0) for r in results.values()),
        seconds=sum(float(r.attrs.get("seconds") or 0) for r in results.values()),
        command=audit.command, config=config.model_dump(mode="json"),
        data_fingerprint=setting.prepared.fingerprint, environment=describe(), notes=list(setting.prepared.notes),
        alerts=[*_replanned(changed), *audit.alerts, *_alerts(arms, audit)], finished=finished,
    )
    if finished and (why := no_answer_of(record)) is not None:
        record.sentence = f"This audit has no answer: {why}"
    elif finished and record.comparison(UNIFORM) is not None:
        record.sentence, record.details = sentence_of(record), details_of(record)
        follow, arm, record.advice = advice_of(record)
        record.follow, record.command_next = follow, record.arm(arm).command if arm else record.command
    return record


def _arm(audit: Audit, results: Results, place: int, arm: Arm) -> ArmRecord:
    setting = audit.setting
    have, rate = tried(results, place), chosen_rate(results, place, setting)
    runs = []
    for index in itertools.count():
        cell = Cell(place, "seed", index)
        if cell not in results:
            break
        runs.append(_run(audit, arm, cell, results[cell]))
    return ArmRecord(
        name=arm.name, what=arm.what, skipped=arm.skipped or failed(results, place, setting), tried=have, rate=rate,
        at_edge=rate is not None and at_edge(have, setting.prepared.direction == "maximize"), runs=runs,
        command=None if rate is None else _command(audit, arm, rate),
    )


def _run(audit: Audit, arm: Arm, cell: Cell, result: Result) -> ArmRun:
    attrs = result.attrs
    names = ("loss", "tune", "params", "peak_params", "ranks")
    return ArmRun(
        seed=attrs.get("seed", seed_of(audit.config, cell)), value=result.value, message=result.message,
        steps=attrs.get("steps") or 0, seconds=attrs.get("seconds") or 0.0,
        folder=audit.folder.run(arm.name, attrs.get(FOLDER) or folder_before(cell)).path.relative_to(
            audit.folder.path
        ).as_posix(),
        **{name: attrs.get(name) for name in names},
    )


def _command(audit: Audit, arm: Arm, rate: float) -> str | None:
    """The command that trains an arm at its best rate; None where one run does not make it."""
    if arm.way != "trained":
        return None
    values = {key: value for key, value in arm.values.items() if _now(audit.config, key) != value}
    values |= {"training.learning_rate": rate, "name": f"{audit.config.name}-{arm.name}"}
    return train_command(audit.folder.config, values)


def _now(config: RunConfig, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


def _comparison(audit: Audit, results: Results, name: str, judged: Judgement) -> ComparisonRecord:
    place = next(place for place, arm in enumerate(audit.arms) if arm.name == name)
    differences = _differences(audit, results, place, judged.seeds)
    low, high = _with_examples(audit, results, place, judged.seeds)
    claim: Any = "undecided" if judged.claim.startswith("undecided") else judged.claim
    return ComparisonRecord(
        arm=name, claim=claim, seeds=judged.seeds, mean=judged.mean, low=_finite(judged.low), high=_finite(judged.high),
        p=judged.p, effect=_finite(judged.effect), both_low=low, both_high=high, differences=differences,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _with_examples(audit: Audit, results: Results, place: int, seeds: int) -> tuple[float | None, float | None]:
    """The interval that holds the variance over examples, too, where the metric has pseudo-values by blocks of them."""
    sign = 1 if audit.setting.prepared.direction == "maximize" else -1
    blocks = [
        [results[Cell(arm, "seed", index)].attrs.get("blocks") for index in range(seeds)] for arm in (0, place)
    ]
    if seeds < 2 or any(one is None for row in blocks for one in row):
        return None, None
    design = design_of(audit.config)
    error = design.level * design.share
    values = sign * (np.asarray(blocks[0], float) - np.asarray(blocks[1], float))
    # the mean of pseudo-values is off the metric's by the jackknife's bias; only their spread is of use here
    found = example_interval(values, error=error, limit=design.limit(error, seeds))
    half, mean = (found.high - found.low) / 2, statistics.fmean(_differences(audit, results, place, seeds))
    return (mean - half, mean + half) if math.isfinite(half) else (None, None)


def stability(patterns: Sequence[Sequence[int]]) -> StabilityRecord:
    """How alike rank patterns are, over all pairs of them.

    Jaccard overlap of rank units is Σ min(r, r') / Σ max(r, r').
    """
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in itertools.combinations(patterns, 2)]
    if not pairs:
        return StabilityRecord()
    overlap = [float(np.minimum(a, b).sum() / max(np.maximum(a, b).sum(), 1)) for a, b in pairs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        related = [float(stats.spearmanr(a, b).statistic) for a, b in pairs]
    known = [one for one in related if math.isfinite(one)]
    return StabilityRecord(
        rank_correlation=statistics.fmean(known) if known else None, jaccard=statistics.fmean(overlap)
    )


def _replanned(plan: dict[str, Any] | None) -> list[str]:
    if plan is None:
        return []
    began = ", ".join(f"{name} {value}" for name, value in plan.items())
    return [
        f"looks, margin or end were changed after seeds had been seen (it began with {began}): the chance of a wrong "
        "claim is no longer bounded by 5 %; a new audit with a seed of its own (seed) would tell"
    ]


def _alerts(arms: Sequence[ArmRecord], audit: Audit) -> list[str]:
    found = []
    edges = [f"{arm.name} ({arm.rate:.6g})" for arm in arms if arm.at_edge]
    if edges:
        found.append(
            f"the best learning rate is the lowest or the highest tried, so that a better one may lie beyond, of "
            f"{', '.join(edges)}; more trials look there (audit.trials, audit.spread)"
        )
    for arm in arms:
        lost = [run for run in arm.runs if run.value is None]
        if lost:
            found.append(f"{arm.name} failed on seed {lost[0].seed}, and is not compared: {lost[0].message}")
        sizes = [run.params for run in arm.runs if run.params is not None]
        cheapest = min(shape.params_per_rank for shape in audit.setting.shapes)
        if sizes and max(sizes) > audit.setting.params + cheapest:
            found.append(f"{arm.name} is larger than the others: {max(sizes):,} parameters")
        elif sizes and max(sizes) < audit.setting.params - max(s.params_per_rank for s in audit.setting.shapes):
            found.append(f"{arm.name} is smaller than the others: {max(sizes):,} parameters")
    return found
