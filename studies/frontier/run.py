"""Can one run answer every budget? See README.md in this folder.

    python -m studies.frontier [--tasks punctuation] [--arms uniform ...] [--steps 160] [--seeds 6] [--workers 2]
    python -m studies.frontier --report                 # tables and the figure from what has finished

The task pos needs the Brown corpus (make brown). Every run is kept in results.json and never repeated.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rankalloc.files import write_json, write_text

from ..common.arguments import QUICK, at_least_one, parse, study_parser
from ..common.grid import Grid, best_rate
from ..common.pool import outcomes
from ..common.results import Results
from .analysis import report, tune_losses
from .arms import ARMS, AUTO, MATRYOSHKA, TASKS, UNIFORM, Cell, grid_of, ranks_of
from .figure import draw
from .one_run import run_cell

HERE = Path(__file__).parent
RATE_SEED, FIRST_SEED = 50, 100
"""The seed that chooses rates, and the first of those that judge."""


def wanted(runs: Sequence[dict], args: argparse.Namespace) -> Iterator[Cell]:
    """What is to be run, as far as it is known by now: first the rates of every arm, then the seeds."""
    for task in args.tasks:
        chosen: dict[tuple[str, int], float] = {}
        for arm in args.arms:
            for rank in ranks_of(arm):
                losses = tune_losses(runs, task, arm, rank)
                grid = Grid.fixed(args.rates) if args.rates else grid_of(arm)
                rates = grid.wanted(losses)
                yield from (Cell(task, "rates", arm, rank, rate, args.steps, RATE_SEED) for rate in rates)
                if not rates and (best := best_rate(losses)) is not None:
                    chosen[arm, rank] = best
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
            yield from (Cell(task, "seeds", *cell, rate, args.steps, seed) for cell, rate in chosen.items())


def line(run: dict[str, Any]) -> str:
    """A finished run in one line."""
    said = "diverged" if "message" in run else ", ".join(f"{one['loss']:.4f}" for one in run["cut"].values())
    return (
        f"{run['task']}, {run['phase']}: {run['arm']} rank {run['rank']} rate {run['rate']:g} seed {run['seed']}: loss "
        f"{said}, {run['seconds']:.0f} s"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(HERE, __doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=at_least_one, default=160)
    parser.add_argument("--seeds", type=at_least_one, default=6, help="paired seeds that judge (6)")
    parser.add_argument("--rates", nargs="+", type=float, help="try these alone (default: a grid for each arm)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run later than this")
    args = parse(
        parser, argv, tasks=["punctuation"], arms=[UNIFORM, AUTO, MATRYOSHKA], steps=4, seeds=2, rates=[4e-3],
        output=QUICK / "frontier" / "results.json",
    )  # fmt: skip
    results = Results(args.output)

    def mine() -> list[dict]:
        return [run for run in results.runs if run["steps"] == args.steps]

    def todo() -> list[Cell]:
        done = {tuple(run[name] for name in Cell._fields) for run in mine()}
        return [cell for cell in wanted(mine(), args) if cell not in done]

    if not args.report:
        for _, run in outcomes(run_cell, todo, args.workers, time.monotonic() + 60 * args.minutes):
            results.add(run)
            print(f"[{len(todo())} to go] {line(run)}", file=sys.stderr, flush=True)
    text, rows, areas = report(mine())
    print(text)
    write_text(args.output.with_name("findings.md"), text + "\n")
    write_json(args.output.with_name("rows.json"), {
        "budgets": [row._asdict() for row in rows], "areas": [area._asdict() for area in areas],
    })  # fmt: skip
    draw(rows, args.output.with_name("frontier"))
