"""Which door is better, PEFT's LoRA layers driven in place or the package's own adapters? See README.md in this folder.

    python -m studies.doors [planted] [language] [punctuation] [--workers 2] [--report] [--quick]

Every run is kept in results.json and never repeated. ``--report`` only prints the tables and draws the figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.arguments import QUICK, at_least_one, parse, study_parser
from ..common.grid import Grid
from ..common.part import Cell, Part, recorded
from ..common.pool import outcomes
from ..common.results import Results
from .analysis import report
from .arms import ARMS
from .figure import draw
from .parts import PARTS

HERE = Path(__file__).parent


def attempt(cell: Cell) -> dict[str, Any]:
    """A run's record; see :func:`studies.common.part.recorded`."""
    return recorded(PARTS[cell.part].run, cell)


def line(run: dict[str, Any]) -> str:
    """A finished run in one line."""
    names = [name for name in ("relative_error", "exact", "loss", "f1") if name in run]
    said = ", ".join(f"{name} {run[name]:.4g}" for name in names) or run["message"]
    return f"{run['place']}, {run['phase']}: {run['arm']} at {run['rate']:g}, seed {run['seed']}: {said}"


def asked(args: argparse.Namespace) -> list[Part]:
    """All parts; with another number of steps or seeds, fixed rates, or fewer arms, where these are given."""
    other = {"steps": args.steps, "seeds": args.seeds, "grid": args.rates and Grid.fixed(args.rates)}
    other = {name: value for name, value in other.items() if value}
    return [
        replace(part, **other, arms=tuple(arm for arm in part.arms if arm in (args.arms or part.arms)))
        for part in PARTS.values()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(HERE, __doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: all of them")
    parser.add_argument("--steps", type=at_least_one, help="optimizer steps of a run (default: the part's own)")
    parser.add_argument("--seeds", type=at_least_one, help="paired seeds that judge (default: the part's own)")
    parser.add_argument("--rates", nargs="+", type=float, help="try these alone (default: a grid that grows)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all of a part")
    args = parse(parser, argv, steps=40, seeds=2, rates=[1e-2], output=QUICK / "doors" / "results.json")
    if wrong := [name for name in args.parts if name not in PARTS]:
        parser.error(f"there is no part {wrong[0]!r}; the parts are {', '.join(PARTS)}")
    results = Results(args.output)
    every = asked(args)
    parts = [part for part in every if part.name in (args.parts or PARTS)]
    for part in [] if args.report else parts:
        for _, run in outcomes(attempt, lambda part=part: part.missing(results.runs), args.workers):
            results.add(run)
            print(f"[{len(part.missing(results.runs))} to go] {line(run)}", file=sys.stderr, flush=True)
    print("\n\n".join(report(part, part.own(results.runs)) for part in parts))
    draw([(part, part.own(results.runs)) for part in every], args.output.parent / "doors")
