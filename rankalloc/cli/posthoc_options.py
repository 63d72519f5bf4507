"""``shrink``, ``compose`` and ``frontier``: their options. What they do is in ``finished``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a LoRA or AdaLoRA, or of a run.")]
Ranks = Annotated[int | None, typer.Option("--ranks", metavar="N", help="Keep N ranks over all layers.")]
Params = Annotated[int | None, typer.Option("--params", metavar="N", help="Keep at most N parameters.")]
Bytes = Annotated[int | None, typer.Option("--bytes", metavar="N", help="Keep at most N bytes of weights.")]
Fraction = Annotated[float | None, typer.Option("--fraction", metavar="F", help="Keep this share of the ranks.")]
MinRank = Annotated[int, typer.Option("--min-rank", metavar="R", help="No layer falls below this rank.")]
MaxRank = Annotated[int | None, typer.Option("--max-rank", metavar="R", help="No layer keeps more than this.")]
Multiple = Annotated[int, typer.Option("--multiple-of", metavar="R", help="Every rank is a multiple of this.")]
Layout = Annotated[
    str, typer.Option("--layout", help="compact: as small as the budget. uniform: padded, right in every server.")
]
Pad = Annotated[int, typer.Option("--pad-to", metavar="R", help="Pad the uniform layout to a multiple of this.")]
Out = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to.")]
Calibrate = Annotated[
    str | None,
    typer.Option("--calibrate", metavar="CONFIG", help="Weigh layers by this task's training data (YAML or a task)."),
]
InputsOnly = Annotated[bool, typer.Option("--inputs-only", help="Calibrate by inputs alone, without gradients.")]
Batches = Annotated[
    int | None, typer.Option("--batches", min=1, metavar="N", help="Batches that calibration sees. [default: 32]")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def shrink(
    adapter: Adapter,
    output: Out,
    ranks: Ranks = None,
    params: Params = None,
    nbytes: Bytes = None,
    fraction: Fraction = None,
    min_rank: MinRank = 0,
    max_rank: MaxRank = None,
    multiple_of: Multiple = 1,
    layout: Layout = "compact",
    pad_to: Pad = 1,
    calibrate: Calibrate = None,
    inputs_only: InputsOnly = False,
    batches: Batches = None,
    max_drop: Annotated[
        str | None,
        typer.Option("--max-drop", metavar="SHARE", help="Instead of a budget: the smallest that loses at most this."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="CONFIG", help="What --max-drop judges by. [default: that of --calibrate]"),
    ] = None,
    cut: Annotated[
        str, typer.Option("--cut", help="svd, or nested: the first ranks of every layer of a dylora run.")
    ] = "svd",
    as_json: Json = False,
) -> None:
    """Make a finished adapter fit an exact budget, without training.

    Keeps the singular triplets, over all layers, that change the adapter least. Without --calibrate no data is needed.
    """
    from .posthoc import Budget, Weighing, run_shrink

    budget = Budget(ranks, params, nbytes, fraction, min_rank, max_rank, multiple_of)
    run_shrink(
        adapter, output, budget, layout, pad_to, Weighing(calibrate, inputs_only, batches), max_drop, task, cut,
        as_json,
    )


def compose(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Folders of adapters of one base.")],
    output: Out,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W", help="One for each, such as 0.7,-0.3. [default: 1]")
    ] = None,
    ranks: Ranks = None,
    params: Params = None,
    nbytes: Bytes = None,
    fraction: Fraction = None,
    min_rank: MinRank = 0,
    max_rank: MaxRank = None,
    multiple_of: Multiple = 1,
    layout: Layout = "compact",
    pad_to: Pad = 1,
    combination: Annotated[
        str, typer.Option("--combination", help="sum, or PEFT's ties, dare_linear, dare_ties.")
    ] = "sum",
    density: Annotated[
        float | None, typer.Option("--density", help="Share of entries that ties and dare keep. [default: 0.5]")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what dare drops.")] = 0,
    heads: Annotated[str, typer.Option("--heads", help="Task heads: equal, first, average or none.")] = "equal",
    missing: Annotated[
        str, typer.Option("--missing", help="A layer that one adapter lacks: error, or zero.")
    ] = "error",
    same_base: Annotated[
        bool, typer.Option("--same-base", help="The adapters name their base differently, and it is the same.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make one adapter of several, within a budget: the best approximation of their weighted sum."""
    from .posthoc import Budget, run_compose

    budget = Budget(ranks, params, nbytes, fraction, min_rank, max_rank, multiple_of)
    run_compose(
        adapters, output, weights, budget, density, as_json, combination=combination, seed=seed, heads=heads,
        missing=missing, same_base=same_base, layout=layout, pad_multiple=pad_to,
    )


def frontier(
    adapter: Adapter,
    task: Annotated[
        str,
        typer.Option(
            "--task", metavar="CONFIG", help="What to evaluate on: a YAML file, such as a run's config.yaml, or all "
            "of a named task.",
        ),
    ],
    output: Out,
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
        typer.Option("--cut", help="svd, or nested: the first ranks of a dylora run. [default: as it was trained]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate one adapter at several budgets: a table, a figure and the knee."""
    from .posthoc import Weighing, run_frontier

    weighing = Weighing(task if calibrate else None, inputs_only, batches)
    run_frontier(adapter, output, task, fractions, split, weighing, cut, as_json)


def add_to(app: typer.Typer, examples: Callable[..., str]) -> None:
    """Declare the three commands."""
    app.command(epilog=examples(
        "rankalloc shrink adapter/ --fraction 0.25 -o small/",
        "rankalloc shrink adapter/ --params 200000 --layout uniform --pad-to 8 -o small/",
        "rankalloc shrink adapter/ --ranks 96 --calibrate my.yaml -o small/",
        "rankalloc shrink adapter/ --max-drop 0.5% --task my.yaml -o small/",
        "rankalloc shrink runs/dylora --fraction 0.5 --cut nested -o small/",
    ))(shrink)
    app.command(epilog=examples(
        "rankalloc compose style/ task/ -o both/",
        "rankalloc compose style/ task/ --weights 0.7,-0.3 --ranks 96 -o both/",
        "rankalloc compose a/ b/ --heads first --combination ties --density 0.4 -o both/",
    ))(compose)
    app.command(epilog=examples(
        "rankalloc frontier runs/run --task runs/run/config.yaml -o runs/frontier",
        "rankalloc frontier runs/dylora --task punctuation -o runs/curve       every rank of a dylora run",
        "rankalloc frontier adapter/ --task my.yaml --fractions 0.5,0.25,0.1 --calibrated -o runs/frontier",
    ))(frontier)
