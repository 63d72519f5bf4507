"""Which method should be rankalloc's default? See README.md in this folder.

    python -m studies.default [--tasks punctuation brown] [--budgets 1 3] [--arms uniform adalora ...]
                              [--phase rates|seeds|both] [--steps 160] [--workers 2] [--minutes 60] [--report] [--quick]

Phase "rates" runs every arm at three rates or more, judged on the tune split. Phase "seeds" runs every arm at its best
rate and six other seeds, judged on the report split, which no choice has seen. Finished runs are kept
in results.json and never repeated, so the study can be stopped at any moment and resumed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rankalloc.files import write_text

from ..common.arguments import QUICK, at_least_one, parse, study_parser
from ..common.grid import Grid
from ..common.pool import outcomes
from ..common.results import Results
from .analysis import (
    Run,
    chosen_rate,
    compare,
    comparison_table,
    missing_pairs,
    run_table,
    sentences,
    tune_losses,
)
from .arms import ARMS, arm_of, grid_of
from .figure import forest_plot
from .one_run import Cell, run_cell, settings, settings_id

HERE = Path(__file__).parent
FIRST_SEED = 100
"""The seeds that judge differ from those that choose a rate, which count from 0."""
TASKS = ("punctuation", "brown", "genre", "valence", "sentiment", "pronunciation")
SPLITS = {"rates": ("tune",), "seeds": ("report",)}


class TaskResults(Results):
    """The results of the tasks asked for, under their present settings and number of steps."""

    def __init__(self, path: Path, tasks: Sequence[str], steps: int | None) -> None:
        super().__init__(path)
        self.of_task = {Path(task).stem: (settings_id(task), settings(task, steps).training.steps) for task in tasks}

    @property
    def runs(self) -> list[Run]:
        return [run for run in self.record["runs"] if self.of_task.get(run["task"]) == (run["settings"], run["steps"])]

    def missing(self, cells: Iterator[Cell]) -> list[Cell]:
        """Those of ``cells`` that have not been run."""
        done = {(r["task"], r["budget"], r["arm"], r["rate"], r["seed"], r["phase"]) for r in self.runs}
        return [cell for cell in cells if identity(cell) not in done]


def phase_of(cell: Cell) -> str:
    return next(phase for phase, splits in SPLITS.items() if splits == cell.splits)


def identity(cell: Cell) -> tuple:
    return (Path(cell.task).stem, cell.budget, cell.arm, cell.rate, cell.seed, phase_of(cell))


def rate_cells(args: argparse.Namespace, runs: Sequence[Run]) -> Iterator[Cell]:
    """Every cell of phase "rates" that is known by now and lacks a seed; a grid grows with what has finished."""
    own = dict.fromkeys(str(arm_of(arm).rates_of) for arm in args.arms)
    for task, budget, arm in itertools.product(args.tasks, args.budgets, own):
        grid = Grid.fixed(args.rates) if args.rates else grid_of(arm_of(arm))
        rates = grid.wanted(tune_losses(runs, Path(task).stem, budget, arm, args.rate_seeds))
        for seed, rate in itertools.product(range(args.rate_seeds), rates):
            yield Cell(task, budget, arm, rate, seed, args.steps, SPLITS["rates"])


def seed_cells(args: argparse.Namespace, runs: Sequence[Run]) -> Iterator[Cell]:
    """Every cell of phase "seeds" whose rate is chosen, seed by seed: stopped early, all arms have equally many."""
    seeds = range(FIRST_SEED, FIRST_SEED + args.seeds)
    for seed, task, budget, arm in itertools.product(seeds, args.tasks, args.budgets, args.arms):
        rate = chosen_rate(runs, Path(task).stem, budget, arm, args.rate_seeds)
        if rate is not None:
            yield Cell(task, budget, arm, rate, seed, args.steps, SPLITS["seeds"])


CELLS: dict[str, Callable[[argparse.Namespace, Sequence[Run]], Iterator[Cell]]] = {
    "rates": rate_cells, "seeds": seed_cells,
}  # fmt: skip


def work(args: argparse.Namespace, results: TaskResults, phase: str) -> None:
    """Run what ``phase`` still lacks."""

    def todo() -> list[Cell]:
        return results.missing(CELLS[phase](args, results.runs))

    for cell, outcome in outcomes(run_cell, todo, args.workers, args.deadline):
        results.add({"phase": phase, "settings": settings_id(cell.task), **outcome})
        print(f"[{phase}, {len(todo())} to go] {describe_outcome(outcome)}", file=sys.stderr, flush=True)


def describe_outcome(outcome: Run) -> str:
    values = outcome.get("report") or outcome.get("tune")
    said = f"{outcome['metric']} {values[outcome['metric']]:.4f}, loss {values['loss']:.4f}" if values else "diverged"
    return (
        f"{outcome['task']} rank {outcome['budget']} {outcome['arm']} rate {outcome['rate']:g} seed "
        f"{outcome['seed']}: {said}, {outcome['seconds']:.0f} s"
    )


def findings(args: argparse.Namespace, results: TaskResults) -> str:
    """The findings as Markdown, and the figure."""
    order = {arm: place for place, arm in enumerate(args.arms)}
    runs = [r for r in results.runs if r["budget"] in args.budgets]
    parts = ["# Findings", "", "Written by `python -m studies.default --report` from results.json.", ""]
    for measure in ("metric", "loss"):
        found = [c for c in compare(runs, measure, args.rate_seeds) if c.arm in order]
        found.sort(key=lambda c: (c.task, c.budget, order[c.arm]))
        if not found:
            parts += [f"No arm shares two seeds with uniform LoRA, so nothing can be compared in {measure} yet.", ""]
            continue
        title = "By the task's own metric" if measure == "metric" else "By loss"
        parts += [f"## {title}", "", comparison_table(found), "", *(f"- {s}" for s in sentences(found)), ""]
        if measure == "metric":
            forest_plot(found, args.output.parent / "forest")
    parts += [*(f"- {s}" for s in missing_pairs(runs)), ""]
    return "\n".join([*parts, "## How each arm was trained", "", run_table(runs, args.rate_seeds), ""])


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(HERE, __doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="YAML files here, or paths")
    parser.add_argument(
        "--budgets", nargs="+", type=at_least_one, default=[1], help="rank of the uniform LoRA of equal size"
    )
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="METHOD or METHOD/CONTROL; see arms.py")
    parser.add_argument("--phase", choices=[*SPLITS, "both"], default="both")
    parser.add_argument("--rates", nargs="+", type=float, help="try these alone (default: a grid for each arm)")
    parser.add_argument("--steps", type=at_least_one, help="optimizer steps of a run (default: the task's file)")
    parser.add_argument("--seeds", type=at_least_one, default=6, help="paired seeds that judge")
    parser.add_argument("--rate-seeds", type=at_least_one, default=1, help="seeds that choose a rate")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run is begun after this time")
    args = parse(
        parser, argv, tasks=["punctuation"], budgets=[1], arms=["uniform", "singular-value"], rates=[8e-3], steps=5,
        seeds=2, rate_seeds=1, output=QUICK / "default" / "results.json",
    )  # fmt: skip
    args.arms = [str(arm_of(arm)) for arm in dict.fromkeys(args.arms)]
    args.deadline = time.monotonic() + 60 * args.minutes

    results = TaskResults(args.output, args.tasks, args.steps)
    if not args.report:
        for phase in SPLITS if args.phase == "both" else [args.phase]:
            work(args, results, phase)
    text = findings(args, results)
    write_text(args.output.parent / "findings.md", text)
    print(text)
