"""Which method finds ranks that are known? See README.md in this folder.

    python -m studies.planted [--variants main half] [--seeds 5] [--methods adalora ...] [--workers 2] [--quick]
    python -m studies.planted --report         # only the table and reports/planted.html, from finished runs

Each (variant, network, method, seed, learning rate, steps) is one training run. Finished ones are kept in results.json
and never repeated, so the study can be stopped at any moment and resumed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rankalloc.files import write_text

from ..common.arguments import QUICK, at_least_one, parse, study_parser
from ..common.pool import outcomes
from ..common.results import Results
from .page import write_page
from .problems import ARCHITECTURES, VARIANTS
from .summary import table
from .training import PROTOCOL, STEPS, few_methods, method_names, rate_of, run

HERE = Path(__file__).parent
REPORT = HERE.parents[1] / "reports" / "planted.html"
BROAD = ("main", "half")
"""The variants that every method runs."""


class Cell(NamedTuple):
    """What identifies a run."""

    variant: str
    architecture: str
    method: str
    seed: int
    rate: float
    steps: int


def set_up() -> None:
    """One thread a process; and subnormal numbers, which gradients become here, cost no time."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def wanted(args: argparse.Namespace) -> Iterator[Cell]:
    """The runs asked for, seed by seed: stopped early, all methods have equally many."""
    for seed in range(args.seeds):
        for variant in args.variants:
            methods = args.methods or (method_names() if variant in BROAD else few_methods())
            for architecture in args.architectures:
                for method in methods:
                    for rate in args.rates or [rate_of(method)]:
                        yield Cell(variant, architecture, method, seed, rate, args.steps)


def cell_of(item: dict[str, Any]) -> Cell:
    """The cell of a finished or failed run."""
    return Cell(*(item[name] for name in Cell._fields))


def attempt(cell: Cell) -> dict[str, Any]:
    """A run's record; for one that fails, its cell and the error: one method must not end the study."""
    try:
        return run(*cell)
    except Exception as error:
        return {"protocol": PROTOCOL, **cell._asdict(), "failed": f"{type(error).__name__}: {error}"}


def keep(results: Results, item: dict[str, Any]) -> None:
    """Add a finished or failed run; it replaces an earlier failure of the same cell."""
    failed = [old for old in results.record["failed"] if cell_of(old) != cell_of(item)]
    results.record["failed"] = [*failed, item] if "failed" in item else failed
    if "failed" not in item:
        results.runs.append(item)
    results.stamp()
    results.save()


def line(item: dict[str, Any]) -> str:
    """A finished or failed run in one line."""
    text = f"{item['variant']} {item['architecture']} {item['method']} seed {item['seed']} rate {item['rate']:g}: "
    if "failed" in item:
        return text + "failed, " + item["failed"]
    return text + f"{item['exact']:.0%} exact, error {item['relative_error']:.1e}, {item['cpu_seconds']:.0f} s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(HERE, __doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument(
        "--methods", nargs="+", choices=method_names(), help="default: all in main and half, a handful in the others"
    )
    parser.add_argument("--seeds", type=at_least_one, default=5, help="seeds 0 to this number, exclusive (5)")
    parser.add_argument("--rates", nargs="+", type=float, help="default: one for each parametrisation")
    parser.add_argument("--steps", type=at_least_one, default=STEPS, help=f"optimizer steps of a run ({STEPS})")
    parser.add_argument("--page", type=Path, default=REPORT, help="where the HTML report goes")
    args = parse(
        parser, argv, variants=["main"], architectures=["mlp"], methods=["auto", "uniform"], seeds=2, steps=40,
        output=QUICK / "planted" / "results.json", page=QUICK / "planted" / "planted.html",
    )  # fmt: skip
    set_up()
    results = Results(args.output, runs=[], failed=[])
    done = {cell_of(item) for item in results.runs if item["protocol"] == PROTOCOL}
    # a run that failed is tried again; runs of another protocol are kept and left alone
    todo = [] if args.report else [cell for cell in wanted(args) if cell not in done]
    for count, (_, item) in enumerate(outcomes(attempt, lambda: todo, args.workers, set_up=set_up), start=1):
        keep(results, item)
        print(f"[{len(todo) - count} to go] {line(item)}", file=sys.stderr, flush=True)
    print(table(results.record))
    write_text(args.page, write_page(results.record))
    print(f"\n{args.page}")
    for item in results.record["failed"]:
        print(line(item), file=sys.stderr)
    return 1 if results.record["failed"] else 0
