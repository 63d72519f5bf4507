"""Which rule places a tight budget best? Many short runs at once on one frozen BERT, for a GPU.

    python -m studies.tight.search --device cuda --sizes "a quarter" --variants base "look-ahead, warm-up 4"
    python -m studies.tight.search --report              # tried.md from tried.json

Every run is kept in tried.json, in its list "this code", and never repeated.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from rankalloc.files import write_text

from ...common.arguments import QUICK, at_least_one, parse, parser_of
from ..arms import SIZES, TASKS
from .runs import Job, batches, outcomes_of
from .table import report
from .tried import HERE, Tried
from .variants import ADOPTED, BASE, BY_HAND, VARIANTS

FOLDER = Path(__file__).parent
FIRST_SEED = 1
RULES = [name for name, variant in VARIANTS.items() if variant.changes is not None]


def wanted(args: argparse.Namespace) -> list[Job]:
    """Every run that the arguments ask for."""
    return [
        Job(task, size, variant, rate, args.steps, seed)
        for task, size, variant in itertools.product(args.tasks, args.sizes, args.variants)
        for rate in (args.rates or VARIANTS[variant].rates)
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("tight.search", __doc__)
    parser.add_argument("--report", action="store_true", help="run nothing: print and write the table")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["a quarter"])
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=RULES, metavar="VARIANT",
        help="names of variants.py (every rule, without the patterns by hand)",
    )  # fmt: skip
    parser.add_argument("--rates", nargs="+", type=float, help="try these alone (default: three or four)")
    parser.add_argument("--steps", type=at_least_one, default=96)
    parser.add_argument("--seeds", type=at_least_one, default=8, help="paired seeds, from 1 (8)")
    parser.add_argument("--at-once", type=at_least_one, default=128, help="runs that train at once (128)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=FOLDER / "tried.json", help="finished runs (tried.json)")
    args = parse(
        parser, argv, tasks=["punctuation"], sizes=["a quarter"], variants=[BASE, ADOPTED, BY_HAND[0]], rates=[1e-2],
        steps=8, seeds=2, output=QUICK / "tight-search" / "tried.json",
    )  # fmt: skip
    tried = Tried(args.output)
    if not args.report:
        _run(tried, args)
    text = report(tried)
    print(text, end="")
    write_text(args.output.with_name("tried.md"), text)


def _run(tried: Tried, args: argparse.Namespace) -> None:
    done = tried.done(HERE)
    todo = [job for job in wanted(args) if job not in done]
    if args.device != "cpu":
        torch.set_float32_matmul_precision("high")
    on = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    made = f"Made by this code on {on}, torch {torch.__version__}."
    left = len(todo)
    for jobs in batches(todo, args.at_once, args.device):
        started = time.perf_counter()
        tried.add(HERE, made, zip(jobs, outcomes_of(jobs, args.device), strict=True))
        tried.save()
        left -= len(jobs)
        seconds = time.perf_counter() - started
        print(f"[{left} to go] {jobs[0].task}: {len(jobs)} runs in {seconds:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
