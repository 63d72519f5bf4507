"""Can one DyLoRA run replace a LoRA run at every rank? See README.md in this folder.

    python -m studies.dylora [--rank 4] [--steps 480] [--seeds 3] [--workers 2] [--report] [--quick]

Every run is kept in results.json and never repeated. ``--report`` only draws the figure and prints the table.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..common.arguments import QUICK, at_least_one, parse, study_parser
from ..common.grid import Grid, best_rate
from ..common.pool import outcomes
from ..common.results import Results
from .analysis import arms, compare, complete, table, tune_losses
from .figure import draw
from .one_run import Cell, run_cell

HERE = Path(__file__).parent
GRID = Grid((1.4e-3, 2e-3, 2.8e-3), factor=math.sqrt(2), digits=2)
"""The rates every arm is tried at, at seed 0."""


def wanted(runs: Sequence[dict], args: argparse.Namespace) -> Iterator[Cell]:
    """What is to be run, as far as it is known by now: the other seeds of an arm wait for its rate."""
    grid = Grid.fixed(args.rates) if args.rates else GRID
    for kind, rank in arms(args.rank):
        losses = tune_losses(runs, kind, rank)
        if rates := grid.wanted(losses):
            yield from (Cell(kind, rank, rate, args.steps, 0) for rate in rates)
        elif best := best_rate(losses):
            yield from (Cell(kind, rank, best, args.steps, seed) for seed in range(1, args.seeds))


def missing(runs: Sequence[dict], args: argparse.Namespace) -> list[Cell]:
    """Those of the wanted cells that have not been run."""
    done = {tuple(run[name] for name in Cell._fields) for run in runs}
    return [cell for cell in wanted(runs, args) if cell not in done]


def line(run: dict) -> str:
    """A finished run in one line."""
    losses = ", ".join(f"{e['tune']['loss']:.3f}" for e in run["evaluations"].values())
    what = f"{run['kind']} rank {run['rank']} rate {run['rate']:g} seed {run['seed']}"
    return f"{what}: tune loss {losses}, {run['seconds']:.0f} s"


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(HERE, __doc__)
    parser.add_argument("--rank", type=at_least_one, default=4, help="DyLoRA's top rank")
    parser.add_argument("--steps", type=at_least_one, default=480)
    parser.add_argument("--seeds", type=at_least_one, default=3, help="paired seeds; rates are chosen at seed 0")
    parser.add_argument("--rates", nargs="+", type=float, help="try these alone (default: a grid that grows)")
    args = parse(
        parser, argv, rank=2, steps=10, seeds=2, rates=[2e-3], output=QUICK / "dylora" / "results.json"
    )
    results = Results(args.output)

    def mine() -> list[dict]:
        return [run for run in results.runs if run["steps"] == args.steps]

    def todo() -> list[Cell]:
        return missing(mine(), args)

    if not args.report:
        for _, run in outcomes(run_cell, todo, args.workers):
            results.add(run)
            print(f"[{len(todo())} to go] {line(run)}", file=sys.stderr, flush=True)
    runs = complete(mine(), args.rank)
    if left := sorted({run["seed"] for run in mine()} - {run["seed"] for run in runs}):
        print(f"left out, since some of their runs are missing: seeds {', '.join(map(str, left))}")
    rows = compare(runs, args.rank)
    print(table(rows))
    if rows:
        draw(rows, args.output.parent / "dylora")
    print(f"within 2 standard errors, or better: {sum(row['within'] for row in rows)} of {len(rows)} ranks")
