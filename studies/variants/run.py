"""Do LoRA's variants reach plain LoRA on a task where rank matters? See README.md in this folder.

    python -m studies.variants [--rank 4] [--steps 96] [--seeds 5] [--workers 2] [--report] [--quick]

Every run is kept in results.json and never repeated. ``--report`` only prints the tables and draws the figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..common.arguments import QUICK, at_least_one, parse, study_parser
from ..common.grid import Grid, best_rate
from ..common.pool import outcomes
from ..common.results import Results
from .analysis import compare, sentences, table, tune_losses
from .arms import ARMS, Cell, run_cell
from .figure import draw

HERE = Path(__file__).parent
FIRST_SEED = 100
"""The seeds that judge differ from those that choose a rate, which count from 0."""


def wanted(runs: Sequence[dict], args: argparse.Namespace) -> Iterator[Cell]:
    """What is to be run, as far as it is known by now: the seeds of an arm wait for its rate."""
    for arm in args.arms:
        losses = tune_losses(runs, arm, args.rate_seeds)
        grid = Grid.fixed(args.rates) if args.rates else Grid(ARMS[arm]["rates"])
        if rates := grid.wanted(losses):
            phase, seeds = "rates", range(args.rate_seeds)
        elif best := best_rate(losses):
            phase, rates, seeds = "seeds", [best], range(FIRST_SEED, FIRST_SEED + args.seeds)
        for rate in rates:
            yield from (Cell(phase, arm, args.rank, rate, args.steps, seed) for seed in seeds)


def missing(runs: Sequence[dict], args: argparse.Namespace) -> list[Cell]:
    """Those of the wanted cells that have not been run."""
    done = {tuple(run[name] for name in Cell._fields) for run in runs}
    return [cell for cell in wanted(runs, args) if cell not in done]


def line(run: dict[str, Any]) -> str:
    """A finished run in one line."""
    values = run.get("report") or run.get("tune")
    said = f"F1 {values['f1']:.4f}, loss {values['loss']:.4f}" if values else "diverged"
    return f"{run['phase']}: {run['arm']} rate {run['rate']:g} seed {run['seed']}: {said}, {run['seconds']:.0f} s"


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(HERE, __doc__)
    parser.add_argument("--rank", type=at_least_one, default=4, help="of plain LoRA, whose size the other arms meet")
    parser.add_argument("--steps", type=at_least_one, default=96)
    parser.add_argument("--seeds", type=at_least_one, default=5, help="paired seeds that judge")
    parser.add_argument("--rate-seeds", type=at_least_one, default=1, help="seeds that choose a rate")
    parser.add_argument("--rates", nargs="+", type=float, help="try these alone (default: a grid for each arm)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parse(
        parser, argv, rank=2, steps=12, seeds=2, rates=[4e-3], arms=["LoRA", "auto"],
        output=QUICK / "variants" / "results.json",
    )  # fmt: skip
    results = Results(args.output)

    def mine() -> list[dict]:
        return [run for run in results.runs if (run["rank"], run["steps"]) == (args.rank, args.steps)]

    def todo() -> list[Cell]:
        return missing(mine(), args)

    if not args.report:
        for _, run in outcomes(run_cell, todo, args.workers):
            results.add(run)
            print(f"[{len(todo())} to go] {line(run)}", file=sys.stderr, flush=True)
    rows = compare(mine(), args.arms, args.rate_seeds)
    print(table(rows))
    print("\n" + "\n".join(f"- {sentence}" for sentence in sentences(rows)))
    draw(rows, args.output.parent / "variants")
