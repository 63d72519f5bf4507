"""Which method should be rankalloc's default? See README.md in this folder.

    python studies/default/run.py [--tasks punctuation brown] [--budgets 1 3] [--arms uniform adalora ...]
                                  [--phase rates|seeds|both] [--steps 48] [--workers 2] [--minutes 60] [--table]

Phase "rates": every arm at three rates or more and two seeds, judged on the tune split. Phase "seeds": the best rate
of every arm and five other seeds, judged on the report split, which no choice has seen. Finished runs are kept in the
JSON file and never run again, so the study can be stopped at any moment and gone on with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

from analysis import (
    Run,
    chosen_rate,
    compare,
    comparison_table,
    missing_pairs,
    run_table,
    sentences,
    tune_losses,
)
from arms import ARMS, REFINED, arm_of, first_rates, further_rate
from figure import forest_plot
from one_run import Cell, run, settings, settings_id

from rankalloc.files import write_json, write_text
from rankalloc.training.environment import describe

HERE = Path(__file__).parent
RATE_SEEDS, FIRST_SEED = 2, 100  # the seeds that judge are none of those that chose
SPLITS = {"rates": ("tune",), "seeds": ("report",)}


class Results:
    """The JSON file of all runs, and those of it that belong to the settings asked for."""

    def __init__(self, path: Path, tasks: Sequence[str], steps: int | None) -> None:
        self.path = path
        self.record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
        self.of_task = {Path(task).stem: (settings_id(task), settings(task, steps).training.steps) for task in tasks}

    @property
    def runs(self) -> list[Run]:
        """Runs of the tasks asked for, under their present settings and number of steps."""
        return [run for run in self.record["runs"] if self.of_task.get(run["task"]) == (run["settings"], run["steps"])]

    def done(self) -> set[tuple]:
        """What :func:`identity` gives for each finished run."""
        return {(r["task"], r["budget"], r["arm"], r["rate"], r["seed"], r["phase"]) for r in self.runs}

    def add(self, cell: Cell, outcome: Run) -> None:
        """Keep one more run; the file is whole at every moment."""
        self.record["runs"].append({"phase": phase_of(cell), "settings": settings_id(cell.task), **outcome})
        self.record["environment"] = {**describe("cpu").model_dump(), "threads": 1}
        write_json(self.path, self.record)


def phase_of(cell: Cell) -> str:
    return next(phase for phase, splits in SPLITS.items() if splits == cell.splits)


def identity(cell: Cell) -> tuple:
    return (Path(cell.task).stem, cell.budget, cell.arm, cell.rate, cell.seed, phase_of(cell))


def rate_cells(args: argparse.Namespace, runs: Sequence[Run]) -> Iterator[Cell]:
    """Every cell of phase "rates" known by now; the grid of an arm grows while its best rate is at an edge."""
    own = dict.fromkeys(str(arm_of(arm).rates_of) for arm in args.arms)
    for task, budget, arm in itertools.product(args.tasks, args.budgets, own):
        first = first_rates(arm_of(arm))
        losses = tune_losses(runs, Path(task).stem, budget, arm, args.rate_seeds)
        rates = [*first, *(rate for rate in losses if rate not in first)]
        if all(rate in losses for rate in first) and (further := further_rate(losses, first, arm in REFINED)):
            rates.append(further)
        for seed, rate in itertools.product(range(args.rate_seeds), rates):
            yield Cell(task, budget, arm, rate, seed, args.steps, SPLITS["rates"])


def seed_cells(args: argparse.Namespace, runs: Sequence[Run]) -> Iterator[Cell]:
    """Every cell of phase "seeds" whose rate is chosen, seed by seed: stopped early, all arms have as many."""
    seeds = range(FIRST_SEED, FIRST_SEED + args.seeds)
    for seed, task, budget, arm in itertools.product(seeds, args.tasks, args.budgets, args.arms):
        rate = chosen_rate(runs, Path(task).stem, budget, arm, args.rate_seeds)
        if rate is not None:
            yield Cell(task, budget, arm, rate, seed, args.steps, SPLITS["seeds"])


def execute(cells: Sequence[Cell], workers: int, deadline: float) -> Iterator[tuple[Cell, Run]]:
    """Each cell with its outcome, as they finish; none is begun after ``deadline``."""
    if workers == 1:
        for cell in cells:
            if time.monotonic() < deadline:
                yield cell, run(cell)
        return
    waiting, running = iter(cells), {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        while True:
            if time.monotonic() < deadline:
                running |= {pool.submit(run, cell): cell for cell in itertools.islice(waiting, workers - len(running))}
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def work(args: argparse.Namespace, results: Results, phase: str) -> None:
    """Run what ``phase`` still lacks, in rounds: what a round finds may ask for more."""
    cells_of = {"rates": rate_cells, "seeds": seed_cells}[phase]
    while time.monotonic() < args.deadline:
        done = results.done()
        todo = [cell for cell in dict.fromkeys(cells_of(args, results.runs)) if identity(cell) not in done]
        if not todo:
            return
        for count, (cell, outcome) in enumerate(execute(todo, args.workers, args.deadline), start=1):
            results.add(cell, outcome)
            print(f"[{phase} {count}/{len(todo)}] {describe_outcome(outcome)}", file=sys.stderr, flush=True)


def describe_outcome(outcome: Run) -> str:
    values = outcome.get("report") or outcome.get("tune")
    said = f"{outcome['metric']} {values[outcome['metric']]:.4f}, loss {values['loss']:.4f}" if values else "diverged"
    return (
        f"{outcome['task']} rank {outcome['budget']} {outcome['arm']} rate {outcome['rate']:g} seed "
        f"{outcome['seed']}: {said}, {outcome['seconds']:.0f} s"
    )


def findings(args: argparse.Namespace, results: Results) -> str:
    """What the runs say, as Markdown."""
    order = {arm: place for place, arm in enumerate(args.arms)}
    runs = [r for r in results.runs if r["budget"] in args.budgets]
    parts = ["# What the runs say", "", "Made by `studies/default/run.py --table` from results.json; not edited.", ""]
    for measure in ("metric", "loss"):
        found = [c for c in compare(runs, measure, args.rate_seeds) if c.arm in order]
        found.sort(key=lambda c: (c.task == "all", c.task, c.budget or 0, order[c.arm]))
        if not found:
            parts += [f"No two seeds of an arm and of uniform LoRA are there to compare in {measure}.", ""]
            continue
        title = "By the task's own metric" if measure == "metric" else "By loss, nats a word"
        parts += [f"## {title}", "", comparison_table(found), "", *(f"- {s}" for s in sentences(found)), ""]
        if measure == "metric":
            forest_plot(found, args.output.parent / "forest")
    parts += [*(f"- {s}" for s in missing_pairs(runs)), ""]
    return "\n".join([*parts, "## What each arm trained with", "", run_table(runs, args.rate_seeds), ""])


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["punctuation", "brown"], help="YAML files here, or paths")
    parser.add_argument("--budgets", nargs="+", type=int, default=[1, 3], help="rank of the uniform LoRA of equal size")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="METHOD or METHOD/CONTROL; see arms.py")
    parser.add_argument("--phase", choices=[*SPLITS, "both"], default="both")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run (default: the task's file)")
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds that judge")
    parser.add_argument("--rate-seeds", type=int, default=RATE_SEEDS, help="seeds that choose a rate")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run is begun after this time")
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    parser.add_argument("--table", action="store_true", help="run nothing: only say what the finished runs do")
    args = parser.parse_args(None if argv is None else list(argv))
    args.arms = [str(arm_of(arm)) for arm in dict.fromkeys(args.arms)]
    args.deadline = time.monotonic() + 60 * args.minutes

    results = Results(args.output, args.tasks, args.steps)
    if not args.table:
        for phase in SPLITS if args.phase == "both" else [args.phase]:
            work(args, results, phase)
    text = findings(args, results)
    write_text(args.output.parent / "findings.md", text)
    print(text)


if __name__ == "__main__":
    main()
