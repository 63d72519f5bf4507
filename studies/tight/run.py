"""Where should a budget below one rank a layer go? See README.md in this folder.

    python -m studies.tight [--tasks punctuation] [--sizes "a quarter"] [--arms auto ...] [--seeds 6] [--workers 2]
    python -m studies.tight --report                 # tables and the figure from what has finished

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
from ..common.grid import Grid
from ..common.pool import outcomes
from ..common.results import Results
from .analysis import Choice, chosen, report, tune_losses
from .arms import ARMS, AS_AUTO, AUTO, HAND, SIZES, TASKS, Cell, fits, grid_of
from .figure import draw
from .one_run import run_cell

HERE = Path(__file__).parent
RATE_SEED, FIRST_SEED = 50, 100
"""The seed that chooses rates and patterns, and the first of those that judge. Neither was used to find the rule."""


def wanted(runs: Sequence[dict], args: argparse.Namespace) -> Iterator[Cell]:
    """What is to be run, as far as it is known by now: size by size and task by task the rates of every arm, then the
    seeds of those that are compared."""
    for size in args.sizes:
        for task in args.tasks:
            yield from _of_place(runs, args, task, size)


def _of_place(runs: Sequence[dict], args: argparse.Namespace, task: str, size: str) -> Iterator[Cell]:
    arms = [arm for arm in args.arms if fits(arm, size)]
    for arm in arms:
        if arm not in AS_AUTO:
            grid = Grid.fixed(args.rates) if args.rates else grid_of(arm)
            for rate in grid.wanted(tune_losses(runs, task, size, arm)):
                yield Cell(task, size, "rates", arm, rate, args.steps, RATE_SEED)
    choices = choices_of(runs, args, task, size)
    for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):  # stopped early, all arms have equally many
        for choice in choices:
            yield Cell(task, size, "seeds", choice.arm, choice.rate, args.steps, seed)


def choices_of(runs: Sequence[dict], args: argparse.Namespace, task: str, size: str) -> list[Choice]:
    """The arms that are compared so far with their rates: all but the patterns by hand, and of those the best one."""
    own = [choice for arm in args.arms if (choice := chosen(runs, args.rates, task, size, arm))]
    rates = {choice.arm: choice.rate for choice in own}
    own += [Choice(arm, rates[AUTO], math.nan) for arm in args.arms if arm in AS_AUTO and AUTO in rates]
    hands = [arm for arm in args.arms if arm in HAND]
    if not hands or any(arm not in rates for arm in hands):
        return [choice for choice in own if choice.arm not in HAND]
    best = min((choice for choice in own if choice.arm in hands), key=lambda choice: (choice.loss, choice.arm))
    return [choice for choice in own if choice.arm not in HAND or choice is best]


def line(run: dict[str, Any]) -> str:
    """A finished run in one line."""
    said = f"loss {run['loss']:.4f}" if "loss" in run else "diverged"
    return (
        f"{run['task']}, {run['size']}, {run['phase']}: {run['arm']} rate {run['rate']:g} seed {run['seed']}: {said}, "
        f"{run['seconds']:.0f} s"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(HERE, __doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=at_least_one, default=96)
    parser.add_argument("--seeds", type=at_least_one, default=6, help="paired seeds that judge (6)")
    parser.add_argument("--rates", nargs="+", type=float, help="try these alone (default: a grid for each arm)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run later than this")
    args = parse(
        parser, argv, tasks=["punctuation"], sizes=["a quarter"], arms=[AUTO, HAND[0], HAND[3], RANDOM_QUICK],
        steps=12, seeds=2, rates=[1e-2], output=QUICK / "tight" / "results.json",
    )  # fmt: skip
    results = Results(args.output)

    def mine() -> list[dict]:
        return [run for run in results.runs if run["steps"] == args.steps]

    def todo() -> list[Cell]:
        done = {tuple(run[name] for name in Cell._fields) for run in mine()}
        return [cell for cell in dict.fromkeys(wanted(mine(), args)) if cell not in done]

    if not args.report:
        for _, run in outcomes(run_cell, todo, args.workers, time.monotonic() + 60 * args.minutes):
            results.add(run)
            print(f"[{len(todo())} to go] {line(run)}", file=sys.stderr, flush=True)
    text, rows = report(mine(), args.rates)
    print(text)
    write_text(args.output.with_name("findings.md"), text + "\n")
    write_json(args.output.with_name("rows.json"), [row._asdict() for row in rows])
    draw(rows, args.output.with_name("tight"))


RANDOM_QUICK = AS_AUTO[0]
