"""``--dry-run``: shows what would be adapted, spent and searched, and writes nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..budget import BudgetPlan, LayerShape
from ..layer_names import places
from .output import count, number, results_only, show, show_json, show_table, trained_row

if TYPE_CHECKING:
    from ..experiments.config import RunConfig
    from ..experiments.runner import Preview
    from ..experiments.sweeps.plan import SweepPlan
    from .request import Request

_CURVE_ROWS = 8


def dry_run(config: RunConfig, request: Request, folder: str, note: str | None) -> None:
    """Show what ``request`` would do. ``note``: why the folder would be refused, or None."""
    with results_only():
        from ..experiments.runner import preview
        from ..methods import find_method

        found = preview(config)
        space = None
        if request.command == "sweep":
            from ..experiments.sweeps.plan import plan_of
            from ..experiments.sweeps.space import search_space

            space, course = search_space(config), plan_of(config, request.trials, found.total_steps)
    early = find_method(config.method).when == "before"
    trials = request.trials or config.sweep.trials
    if request.as_json:
        return show_json({
            "dry_run": True, "command": request.line(whole=False), "output": folder, "refused": note,
            "config": config.model_dump(mode="json"), "model": found.model, "examples": found.examples,
            "layers": [asdict(layer) for layer in found.layers], "heads": found.heads,
            "notes": found.notes, "alerts": found.alerts, "params": {
                "initial": found.params_initial, "final": found.params_final, "trained": found.trained,
                "stored": found.stored,
            },
            "budget": {
                "unit": found.plan.unit, "initial": found.plan.initial, "target": found.plan.target,
                "total_steps": found.total_steps, "warmup_steps": found.plan.warmup_steps,
                "freeze_step": found.plan.freeze_step,
                "curve": [{"step": step, "asked": asked} for step, asked, _ in curve(found.plan, early)],
            },
            **({} if space is None else {"search_space": space, "trials": trials, "plan": asdict(course)}),
        })
    show("dry run: nothing is written", style="bold")
    show_table(_overview(config, found, folder, note))
    show()
    header = ("layer", "layers", "d_in", "d_out", "rank", "parameters")
    show_table(layer_rows(found.layers), header, right=range(1, 6))
    show()
    plan = found.plan
    show_table(
        [(step, f"{asked:,}", f"{asked / plan.initial:.0%}", phase) for step, asked, phase in curve(plan, early)],
        ("step", f"budget ({plan.unit})", "of initial", ""), right=(0, 1, 2),
    )
    if space is not None:
        show()
        show(f"search space of {count(trials, 'trial')}, drawn by {config.sweep.sampler}")
        show_table([(name, dimension_text(dimension)) for name, dimension in space.items()])
        show()
        show_table(_course(course))


def _course(course: SweepPlan) -> list[tuple[str, str]]:
    """What a sweep does, in the order in which it does it."""
    limits = ", ".join(f"{name} at most {number(limit)}" for name, limit in course.limits.items())
    goal = f"the front of {course.metric} against {course.against}" if course.against else f"the best {course.metric}"
    first = ", ".join(f"{amount} {role}" for role, amount in course.first.items())
    column = ", ".join(map(number, course.column))
    rungs = " and ".join(f"{step:,}" for step in course.rungs)
    return [
        ("looks for", goal + (f" with {limits}" if limits else "")),
        ("begins with", first),
        *([("stops early", f"poor trials, after step {rungs}, within their method")] if course.rungs else []),
        *([("column", f"every run is cut to budgets {column}")] if course.column else []),
        *([("then trains again", f"the best {course.finalists} with {count(course.fresh_seeds, 'fresh seed')} each")]
          if course.finalists > 1 else []),
        ("training steps", f"at most {course.steps:,}"),
    ]


def _overview(config: RunConfig, found: Preview, folder: str, note: str | None) -> list[tuple[str, str]]:
    amounts = {split: "streamed" if amount is None else number(amount) for split, amount in found.examples.items()}
    examples = ", ".join(f"{amount} {split}" for split, amount in amounts.items())
    heads = ", ".join(f"{name} ({params:,} parameters, trained whole)" for name, params in found.heads.items())
    params = f"{found.params_initial:,} at the start"
    if found.params_final is not None:
        params += f", at most {found.params_final:,} at the end"
    rows = [
        ("task", f"{config.task if isinstance(config.task, str) else config.task.kind} ({examples} examples)"),
        ("model", found.model),
        ("method", config.method),
        ("adapts", f"{count(len(found.layers), 'layer')}, {sum(s.rank for s in found.layers):,} ranks at the start"),
        ("heads", heads or "none"),
        ("parameters", params),
        *trained_row(found.trained, found.params_initial),
        ("in the file", _file_text(found, config.reader)),
        ("steps", f"{found.total_steps:,}"),
        ("output", folder),
        *(("note", said) for said in found.notes),
        *(("alert", said) for said in found.alerts),
    ]
    return [*rows, ("note", f"a real run would be refused: {note}")] if note else rows


def _file_text(found: Preview, reader: str | None) -> str:
    """The most numbers that the adapter's file can hold."""
    if found.params_final is None or found.stored <= found.params_final:
        return f"at most {found.stored:,} numbers"
    whom = f" for {reader}" if reader else ""
    return f"at most {found.stored:,} numbers, as they are padded{whom}"


def layer_rows(layers: list[LayerShape]) -> list[tuple[str, ...]]:
    """One row per role and shape: role, number of layers, d_in, d_out, ranks, parameters."""
    groups: dict[tuple[str, int, int], list[LayerShape]] = {}
    for layer, (_, role) in zip(layers, places([layer.name for layer in layers]), strict=True):
        groups.setdefault((role, layer.d_in, layer.d_out), []).append(layer)
    rows: list[tuple[str, ...]] = []
    for (role, d_in, d_out), members in groups.items():
        ranks = sorted({member.rank for member in members})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        params = sum(member.rank * member.params_per_rank + member.extra for member in members)
        rows.append((role, f"{len(members):,}", f"{d_in:,}", f"{d_out:,}", shown, f"{params:,}"))
    return rows


def curve(plan: BudgetPlan, early: bool) -> list[tuple[int, int, str]]:
    """(step, budget asked, phase) at a few steps. ``early``: the ranks are chosen before training."""
    if early:
        return [(1, plan.target, "ranks chosen before training"), (plan.total_steps, plan.target, "")]
    between = [step for step in range(plan.warmup_steps + plan.every, plan.freeze_step, plan.every)]
    if len(between) > _CURVE_ROWS - 3:
        last = len(between) - 1
        between = [between[round(i * last / (_CURVE_ROWS - 4))] for i in range(_CURVE_ROWS - 3)]
    points = [(step, "allocating") for step in between] + [(plan.freeze_step, "ranks freeze")]
    if plan.warmup_steps:
        points.insert(0, (plan.warmup_steps, "end of warm-up"))
    if plan.freeze_step < plan.total_steps:
        points.append((plan.total_steps, "end"))
    return [(step, plan.asked(step), phase) for step, phase in points]


def dimension_text(dimension: dict[str, Any]) -> str:
    """One dimension of a search space in words."""
    methods = f", for {', '.join(dimension['when'])} only" if "when" in dimension else ""
    if "choices" in dimension:
        choices = [number(choice) for choice in dimension["choices"]]
        return (f"always {choices[0]}" if len(choices) == 1 else f"one of {', '.join(choices)}") + methods
    step = f", in steps of {number(dimension['step'])}" if dimension["step"] else ""
    scale = ", log scale" if dimension["log"] else ""
    return f"{number(dimension['low'])} to {number(dimension['high'])}{scale}{step}{methods}"
