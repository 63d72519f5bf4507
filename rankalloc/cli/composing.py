"""``compose``: one adapter of several, and whether its parts do more than random ones would."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .options import AdapterOutput, Command, For, Json, Layout, PadTo, declare
from .output import count, number, results_only, say, show, show_table
from .posthoc import BudgetOptions, Reported, configured, evaluator, numbers, show_cut
from .posthoc_commands import Bytes, Fraction, MaxRank, MinRank, Multiple, Params, Ranks
from .progress import Bar

if TYPE_CHECKING:
    from ..experiments.judging import TaskEvaluator
    from ..posthoc.results import CutResult

_CONTROLS = 3


def compose(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Folders of adapters of one base.")],
    output: AdapterOutput,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W", help="One per adapter, such as 0.7,-0.3. [default: 1]")
    ] = None,
    ranks: Ranks = None,
    params: Params = None,
    nbytes: Bytes = None,
    fraction: Fraction = None,
    min_rank: MinRank = 0,
    max_rank: MaxRank = None,
    multiple_of: Multiple = 1,
    reader: For = None,
    layout: Layout = None,
    pad_to: PadTo = 1,
    combination: Annotated[
        str, typer.Option("--combination", help="sum, or PEFT's ties, dare_linear, dare_ties.")
    ] = "sum",
    density: Annotated[
        float | None, typer.Option("--density", help="Share of entries that ties and dare keep. [default: 0.5]")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the entries that dare drops.")] = 0,
    heads: Annotated[str, typer.Option("--heads", help="Task heads: equal, first, average or none.")] = "equal",
    missing: Annotated[
        str, typer.Option("--missing", help="For a layer that one adapter lacks: error, or zero.")
    ] = "error",
    same_base: Annotated[
        bool, typer.Option("--same-base", help="Take the bases to be the same, though their names differ.")
    ] = False,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="CONFIG", help="Evaluate the result, its parts and controls (YAML or a task)."),
    ] = None,
    controls: Annotated[
        int | None, typer.Option("--controls", min=1, metavar="N", help="Controls to evaluate. [default: 3]")
    ] = None,
    control: Annotated[
        int | None,
        typer.Option("--control", metavar="SEED", help="Write the control: random adapters but for the first."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Combine several adapters into one, within a budget: the best approximation of their weighted sum.

    With --task also says whether the partners of the first adapter do more than random ones of their size.
    """
    if density is not None and combination == "sum":
        raise ConfigError("--density is for --combination ties, dare_linear or dare_ties; leave it out for a sum")
    if controls is not None and task is None:
        raise ConfigError("--controls are evaluated; give --task CONFIG too, or leave it out")
    if control is not None and task is not None:
        raise ConfigError("--control writes a control, and --task evaluates some by itself; give one of them")
    budget = BudgetOptions(ranks, params, nbytes, fraction, min_rank, max_rank, multiple_of)
    how: dict[str, Any] = {
        "weights": None if weights is None else numbers("--weights", weights),
        "budget": budget.resolved() if budget.given else None, "combination": combination, "seed": seed,
        "heads": heads, "missing": missing, "same_base": same_base, "reader": reader, "layout": layout,
        "pad_multiple": pad_to, **({} if density is None else {"density": density}),
    }
    with results_only(), Bar() as bar:
        from ..posthoc.composing import RECORD_NAME
        from ..posthoc.composing import compose as run

        if task is not None:
            configured(task)  # its mistakes come before anything is written
        result = run(adapters, out=output, control=control, progress=bar, **how)
        if task is not None:
            result.extra["judged"] = _judged(evaluator(task), adapters, output, controls or _CONTROLS, how)
            result.save(Path(output) / RECORD_NAME)
    show_cut(result, output, as_json)
    if not as_json:
        _show_interference(result)
        if task is not None:
            _show_judged(result.extra["judged"])


def _judged(
    judge: TaskEvaluator, adapters: Sequence[str], output: str, controls: int, how: Mapping[str, Any]
) -> dict[str, Any]:
    """The metric on the tune split of the parts, of the composition, and of as many controls."""
    from ..posthoc.composing import compose as run

    reported = Reported(judge)
    parts = []
    for adapter in adapters:
        say(f"evaluating {adapter}")
        parts.append(reported(Path(adapter)))
    say(f"evaluating the composition and {count(controls, 'control')}")
    both, random = reported(Path(output)), []
    with tempfile.TemporaryDirectory() as place:
        for number in range(controls):
            # partners are seeded one after another, so that no two controls have one in common
            run(adapters, out=Path(place) / str(number), control=number * len(adapters), **how)
            random.append(reported(Path(place) / str(number)))
    sign = 1 if judge.higher_is_better else -1
    ahead = sign * both > max(sign * value for value in random)
    verdict = (
        "The composition is ahead of every control" if ahead else
        "The partners do no more than random adapters of their size"
    )
    best = max(range(len(parts)), key=lambda i: sign * parts[i])
    if sign * both <= sign * parts[best]:
        verdict += f", and {adapters[best]} alone is as good or better"
    return {
        "metric": judge.task.metric, "split": judge.split, "parts": parts, "composed": both, "controls": random,
        "verdict": f"{verdict}.",
    }


def _show_judged(judged: Mapping[str, Any]) -> None:
    show()
    show_table([
        (f"{judged['metric']} ({judged['split']})", number(judged["composed"])),
        ("of the parts", "  ".join(number(value) for value in judged["parts"])),
        ("of controls", "  ".join(number(value) for value in judged["controls"])),
    ])
    show(judged["verdict"])


def _show_interference(result: CutResult) -> None:
    rows = [
        (name, f"{m['first'] + 1} and {m['second'] + 1}", f"{m['output_overlap']:.3f}", f"{m['input_overlap']:.3f}",
         f"{m['alignment']:+.3f}")
        for name, pairs in result.extra["interference"].items() for m in pairs
    ]
    if rows:
        show()
        show_table(rows, ("layer", "adapters", "overlap of outputs", "of inputs", "alignment"), right=(2, 3, 4))


COMMANDS: dict[str, Command] = {
    "compose": (
        compose,
        "rankalloc compose style/ task/ -o both/",
        "rankalloc compose style/ task/ --weights 0.7,-0.3 --ranks 96 -o both/",
        "rankalloc compose a/ b/ --task my.yaml -o both/       is b more than a random adapter of its size?",
        "rankalloc compose a/ b/ --heads first --combination ties --density 0.4 -o both/",
    ),
}


def register(app: typer.Typer) -> None:
    """Add the command of this file to ``app``."""
    declare(app, COMMANDS)
