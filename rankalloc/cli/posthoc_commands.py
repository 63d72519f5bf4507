"""The commands ``shrink`` and ``frontier`` and their options; ``posthoc`` does the work."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import AdapterOutput, Command, For, Json, Layout, PadTo, declare

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a LoRA or AdaLoRA, or of a run.")]
Ranks = Annotated[int | None, typer.Option("--ranks", metavar="N", help="Keep N ranks over all layers.")]
Params = Annotated[int | None, typer.Option("--params", metavar="N", help="Keep at most N parameters.")]
Bytes = Annotated[int | None, typer.Option("--bytes", metavar="N", help="Keep at most N bytes of weights.")]
Fraction = Annotated[float | None, typer.Option("--fraction", metavar="F", help="Keep this share of the parameters.")]
MinRank = Annotated[int, typer.Option("--min-rank", metavar="R", help="No layer falls below this rank.")]
MaxRank = Annotated[int | None, typer.Option("--max-rank", metavar="R", help="No layer keeps more than this.")]
Multiple = Annotated[int, typer.Option("--multiple-of", metavar="R", help="Every rank is a multiple of this.")]
Calibrate = Annotated[
    str | None,
    typer.Option("--calibrate", metavar="CONFIG", help="Weigh layers by this task's training data (YAML or a task)."),
]
InputsOnly = Annotated[bool, typer.Option("--inputs-only", help="Calibrate by inputs alone, without gradients.")]
Batches = Annotated[
    int | None, typer.Option("--batches", min=1, metavar="N", help="Batches that calibration sees. [default: 32]")
]
LearningRate = Annotated[
    float | None,
    typer.Option("--learning-rate", metavar="X", help="Of --recover. [default: a quarter of the task's]"),
]


def shrink(
    adapter: Adapter,
    output: AdapterOutput,
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
    calibrate: Calibrate = None,
    inputs_only: InputsOnly = False,
    batches: Batches = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            "--max-drop", metavar="SHARE", help="Instead of a budget: find the smallest that loses at most this share."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", metavar="CONFIG", help="Task for --max-drop and --recover. [default: that of --calibrate]"
        ),
    ] = None,
    recover: Annotated[
        int | None,
        typer.Option("--recover", min=1, metavar="STEPS", help="Train on for so many steps after the cut, on --task."),
    ] = None,
    learning_rate: LearningRate = None,
    cut: Annotated[
        str, typer.Option("--cut", help="svd, or nested: the first ranks of every layer of a dylora or matryoshka run.")
    ] = "svd",
    as_json: Json = False,
) -> None:
    """Make a finished adapter fit an exact budget.

    Drops the singular triplets, over all layers, that contribute least. Needs no data, and trains nothing, unless
    --calibrate or --recover is given.
    """
    from .posthoc import BudgetOptions, Weighing, run_shrink

    budget = BudgetOptions(ranks, params, nbytes, fraction, min_rank, max_rank, multiple_of)
    run_shrink(
        adapter, output, budget, {"reader": reader, "layout": layout, "pad_multiple": pad_to},
        Weighing(calibrate, inputs_only, batches), max_drop, task, cut, recover, learning_rate, as_json,
    )


def frontier(
    adapter: Adapter,
    task: Annotated[
        str,
        typer.Option(
            "--task", metavar="CONFIG", help="What to evaluate on: a YAML file, such as a run's config.yaml, or a "
            "named task.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to.")],
    fractions: Annotated[
        str | None,
        typer.Option(
            "--fractions", metavar="F,F", help="Shares of the parameters to try. [default: "
            "0.75,0.5,0.375,0.25,0.125; with nested cuts every rank]"
        ),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split to evaluate on: tune, or report.")] = "tune",
    calibrate: Annotated[bool, typer.Option("--calibrated", help="Weigh layers by the task's training data.")] = False,
    inputs_only: InputsOnly = False,
    batches: Batches = None,
    cut: Annotated[
        str | None,
        typer.Option(
            "--cut", help="svd, or nested: the first ranks of a dylora or matryoshka run. [default: as it was trained]"
        ),
    ] = None,
    recover: Annotated[
        int | None,
        typer.Option("--recover", min=1, metavar="STEPS", help="Train on for so many steps after each cut."),
    ] = None,
    learning_rate: LearningRate = None,
    as_json: Json = False,
) -> None:
    """Evaluate one adapter at several budgets: a table, a figure and the knee."""
    from .posthoc import Weighing, run_frontier

    weighing = Weighing(task if calibrate else None, inputs_only, batches)
    run_frontier(adapter, output, task, fractions, split, weighing, cut, recover, learning_rate, as_json)


COMMANDS: dict[str, Command] = {
    "shrink": (
        shrink,
        "rankalloc shrink adapter/ --fraction 0.25 -o small/",
        "rankalloc shrink adapter/ --params 200000 --for tgi -o small/",
        "rankalloc shrink adapter/ --ranks 96 --calibrate my.yaml -o small/",
        "rankalloc shrink adapter/ --max-drop 0.5% --task my.yaml -o small/",
        "rankalloc shrink adapter/ --fraction 0.25 --recover 50 --task my.yaml -o small/",
        "rankalloc shrink runs/dylora --fraction 0.5 --cut nested -o small/",
    ),
    "frontier": (
        frontier,
        "rankalloc frontier runs/run --task runs/run/config.yaml -o runs/frontier",
        "rankalloc frontier runs/dylora --task punctuation -o runs/curve       every rank of a dylora run",
        "rankalloc frontier adapter/ --task my.yaml --fractions 0.5,0.25,0.1 --calibrated -o runs/frontier",
        "rankalloc frontier runs/run --task runs/run/config.yaml --recover 16 -o runs/curve",
    ),
}


def register(app: typer.Typer) -> None:
    """Add the commands of this file to ``app``."""
    declare(app, COMMANDS)
