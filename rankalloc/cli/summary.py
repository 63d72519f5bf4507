"""The summary of a finished run or sweep: the budget asked and reached, the quality, and the files' paths."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any

from .output import count, number, show_json, show_table, stored_text, trained_row
from .progress import trial_line

if TYPE_CHECKING:
    from ..experiments.config import RunConfig
    from ..trace import PairRecord, RankTrace, SweepRecord, TrialRecord


def show_run(trace: RankTrace, config: RunConfig, folder: str, report: str | None, as_json: bool) -> None:
    """Print the summary of ``rankalloc train``."""
    from ..experiments.run_folder import ADAPTER_NAME
    from ..experiments.tasks import metric_of
    from ..trace import TRACE_NAME

    metric = metric_of(config).metric
    reached = trace.allocations[-1].reached if trace.allocations else trace.budget.initial
    paths = {
        "adapter": os.path.join(folder, ADAPTER_NAME), "trace": os.path.join(folder, TRACE_NAME), "report": report,
    }
    if as_json:
        budget = trace.budget
        return show_json({
            "name": trace.name, "method": trace.method, "folder": folder, "steps": trace.steps_done,
            "budget": {"unit": budget.unit, "asked": budget.target, "reached": reached, "initial": budget.initial},
            "ranks": {layer.name: rank for layer, rank in zip(trace.layers, trace.final_ranks, strict=True)},
            "adapter_params": trace.adapter_params_final, "trained_params": trace.trained_params_final,
            "metric": metric, "stored": trace.stored.model_dump() if trace.stored else None,
            "evaluations": {e.split: {"examples": e.examples, **e.metrics} for e in trace.evaluations},
            "alerts": trace.alerts, "notes": trace.notes, "seconds": trace.wall_seconds, "command": trace.command,
            **paths,
        })
    asked, unit, initial = trace.budget.target, trace.budget.unit, trace.budget.initial
    rows = [
        ("budget", f"{asked:,} {unit} asked, {reached:,} reached (of {initial:,} at the start)"),
        ("layers", f"{count(len(trace.layers), 'layer')}, ranks {min(trace.final_ranks)} to {max(trace.final_ranks)}"),
        *trained_row(trace.trained_params_final, trace.adapter_params_final),
        *([("in the file", _stored(trace))] if trace.stored else []),
        *((e.split, _metrics(e.metrics, metric) + f"  ({count(e.examples, 'example')})") for e in trace.evaluations),
        *(("note", said) for said in (*trace.alerts, *trace.notes)),
        *_paths(paths),
    ]
    show_table(rows)


def _stored(trace: RankTrace) -> str:
    assert trace.stored is not None
    stored = trace.stored
    return stored_text(stored.numbers - stored.padding, stored.numbers, stored.padding_bytes, stored.reader)


def show_sweep(record: SweepRecord, folder: str, report: str | None, as_json: bool) -> None:
    """Print the summary of ``rankalloc sweep``."""
    from ..experiments.run_folder import BEST_NAME
    from ..trace import SWEEP_NAME

    paths = {"best": os.path.join(folder, BEST_NAME), "sweep": os.path.join(folder, SWEEP_NAME), "report": report}
    if as_json:
        kept = record.model_dump(mode="json", exclude={"version", "created", "config", "storage"})
        return show_json({**kept, "folder": folder, "paths": paths})
    states = Counter(trial.state for trial in record.trials)
    shown = [f"{states['complete']} complete"]
    shown += [f"{states['pruned']} stopped early"] if states["pruned"] else []
    others = len(record.trials) - states["complete"] - states["pruned"]
    shown += [f"{others} not"] if others else []
    assert record.best is not None  # a sweep in which no trial completes raises
    best = record.trial(record.best)
    rows = [
        ("trials", ", ".join(shown) + (f"; {record.steps:,} training steps in all" if record.steps else "")),
        ("best trial", trial_line(best, record.metric)),
        ("", f"{best.ranks} ranks, {number(best.adapter_params)} adapter parameters"),
        *fresh_row(best),
        *_front(record),
        *_column(record),
        *([("compared", _compared(record.pair))] if record.pair is not None else []),
        *_paths(paths),
    ]
    show_table(rows)


def _front(record: SweepRecord) -> list[tuple[str, str]]:
    """The front of a sweep that looked for it."""
    if (record.config.get("sweep") or {}).get("goal") != "pareto":
        return []
    size = {"params": "adapter_params", "bytes": "stored_bytes"}[record.config["sweep"]["against"]]
    return [
        ("front", f"{trial_line(trial, record.metric)}  {number(getattr(trial, size))} {size.replace('_', ' ')}")
        for trial in map(record.trial, record.front)
    ]  # fmt: skip


def _column(record: SweepRecord) -> list[tuple[str, str]]:
    """The answer at every budget of a sweep whose runs are shared."""
    return [
        (
            f"budget {number(one.budget)}",
            f"trial {one.trial}  {record.metric} {number(one.shared)} cut from its run, {number(one.direct)} trained "
            "at it",
        )
        for one in record.column
    ]  # fmt: skip


def fresh_row(trial: TrialRecord) -> list[tuple[str, str]]:
    """What a trial came to with seeds that it was not chosen by; [] where there are none."""
    if not trial.fresh:
        return []
    mean, spread = statistics.fmean(trial.fresh), statistics.stdev(trial.fresh) if len(trial.fresh) > 1 else 0.0
    error = f" ± {number(spread / len(trial.fresh) ** 0.5)}" if spread else ""
    return [("", f"with fresh seeds {number(mean)}{error} ({count(len(trial.fresh), 'seed')})")]


def _compared(pair: PairRecord) -> str:
    loss = "the same"
    if pair.difference:
        loss = f"{abs(pair.difference):.4g} {'lower' if pair.difference < 0 else 'higher'}"
    return (
        f"trial {pair.adaptive} against uniform trial {pair.uniform} on the report split: {pair.metric} "
        f"{number(pair.adaptive_metrics.get(pair.metric))} against {number(pair.uniform_metrics.get(pair.metric))}, "
        f"loss {loss} (95 % interval of the difference {pair.low:.4g} to {pair.high:.4g})"
    )


def _metrics(metrics: dict[str, float], first: str) -> str:
    names = [first, *(name for name in metrics if name != first)]
    return "  ".join(f"{name} {number(metrics[name])}" for name in names if name in metrics)


def _paths(paths: dict[str, str | None]) -> list[tuple[str, Any]]:
    return [(name, path) for name, path in paths.items() if path is not None]
