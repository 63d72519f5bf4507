"""``refine``: weigh a finished adapter's singular values anew, and say whether that helped."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import AdapterOutput, Command, For, Json, Layout, PadTo, declare
from .output import count, number, results_only, say, show, show_json, show_table
from .progress import Bar

if TYPE_CHECKING:
    from ..posthoc.refining import Refinement

_BATCHES = 32


def refine(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a LoRA or AdaLoRA, or of a run.")],
    output: AdapterOutput,
    task: Annotated[
        str, typer.Option("--task", metavar="CONFIG", help="What it was trained for: a YAML file, or a named task.")
    ],
    rule: Annotated[
        str, typer.Option("--rule", help="select: the most sensitive values grow. gradient: a step downhill.")
    ] = "select",
    bound: Annotated[float, typer.Option("--bound", metavar="B", help="No value changes by more than this.")] = 1.25,
    batches: Annotated[
        int, typer.Option("--batches", min=1, metavar="N", help="Training batches to measure on.")
    ] = _BATCHES,
    controls: Annotated[
        int, typer.Option("--controls", min=1, metavar="N", help="Shuffles of the factors to compare with.")
    ] = 3,
    reader: For = None,
    layout: Layout = None,
    pad_to: PadTo = 1,
    as_json: Json = False,
) -> None:
    """Weigh the singular values of a finished adapter anew by gradients, without training.

    Ranks and directions stay. Also evaluates what shuffled weights do, and says when they do as well.
    """
    with results_only(), Bar() as bar:
        from ..files import write_json
        from ..posthoc.refining import RECORD_NAME, check_arguments
        from ..posthoc.refining import refine as run
        from ..posthoc.sensitivity import sensitivities
        from ..posthoc.shrinking import open_adapter
        from ..storage.readers import layout_for
        from .posthoc import Reported, evaluator

        how: dict[str, Any] = {"reader": reader, "layout": layout, "pad_multiple": pad_to}
        layout_for(layout, pad_to, reader)  # mistakes come before a model is built
        folder = open_adapter(adapter, output).folder
        check_arguments(rule, bound)
        judge = evaluator(task)
        say(f"measuring gradients on {count(batches, 'batch', 'batches')}")
        seen = sensitivities(
            judge.model, folder, judge.batches(batches), progress=lambda done: bar(done, batches, {})
        )
        done = run(folder, seen, output, rule=rule, bound=bound, **how)
        say(f"evaluating the adapter, what came of it, and {count(controls, 'shuffle')}")
        reported = Reported(judge)
        before, after = reported(folder), reported(Path(output))
        shuffled = []
        with tempfile.TemporaryDirectory() as place:
            for seed in range(controls):
                control = Path(place) / str(seed)
                run(folder, seen, control, rule=rule, bound=bound, shuffled=seed)
                shuffled.append(reported(control))
        judged: dict[str, Any] = {
            "metric": judge.task.metric, "split": judge.split, "before": before, "after": after, "shuffled": shuffled,
            "verdict": verdict_of(1 if judge.higher_is_better else -1, before, after, shuffled),
        }
        write_json(Path(output) / RECORD_NAME, {**done.record(), "judged": judged})
    if as_json:
        return show_json({**done.record(), "judged": judged, "path": output})
    _show(done, judged, output)
    show(judged["verdict"])


def verdict_of(sign: int, before: float, after: float, shuffled: Sequence[float]) -> str:
    """One sentence; ``sign`` is -1 where less is better."""
    if sign * (after - before) <= 0:
        return "Refining did not help here: the adapter was as good or better before."
    if sign * after <= max(sign * value for value in shuffled):
        return "Refining did not help here: weights that were handed out by chance do as well."
    return "Refined is ahead of the adapter and of every shuffle, on one split: check it on data of its own."


def _show(done: Refinement, judged: dict[str, Any], output: str) -> None:
    shuffled: Sequence[float] = judged["shuffled"]
    moved = sum(factor != 1 for layer in done.layers for factor in layer.factors)
    show_table([
        ("values", f"{moved:,} of {sum(len(layer.sigma) for layer in done.layers):,} changed, each by at most a factor "
                   f"of {done.bound:g}; every layer keeps the sum of its own"),
        ("before", f"{judged['metric']} {number(judged['before'])}  ({judged['split']})"),
        ("refined", number(judged["after"])),
        ("shuffled", "  ".join(number(value) for value in shuffled)),
        ("adapter", output),
    ])


COMMANDS: dict[str, Command] = {
    "refine": (
        refine,
        "rankalloc refine adapter/ --task my.yaml -o refined/",
        "rankalloc refine runs/run --task runs/run/config.yaml --rule gradient --bound 1.1 -o refined/",
    ),
}


def register(app: typer.Typer) -> None:
    """Add the command of this file to ``app``."""
    declare(app, COMMANDS)
