"""Does choosing ranks help a real language model that learns a chat task? See README.md in this folder.

    python -m studies.chat [half] [two] [--workers 2] [--report] [--quick]

Every run is kept in results.json and never repeated. ``--report`` only prints the tables and draws the figure.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.arguments import QUICK, at_least_one, parse, study_parser
from ..common.grid import Grid
from ..common.part import Cell, recorded
from ..common.pool import outcomes
from ..common.results import Results
from . import task, training
from .analysis import report
from .figure import draw
from .parts import PARTS, STEPS

HERE = Path(__file__).parent


def attempt(cell: Cell) -> dict[str, Any]:
    """A run's record; see :func:`studies.common.part.recorded`."""
    return recorded(training.run, cell)


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(HERE, __doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: both")
    parser.add_argument("--steps", type=at_least_one, help=f"optimizer steps of a run ({STEPS})")
    parser.add_argument("--seeds", type=at_least_one, help="paired seeds that judge (5)")
    parser.add_argument("--rates", nargs="+", type=float, help="try these alone (default: a grid that grows)")
    args = parse(parser, argv, steps=4, seeds=2, rates=[3e-3], output=QUICK / "chat" / "results.json")
    if wrong := [name for name in args.parts if name not in PARTS]:
        parser.error(f"there is no part {wrong[0]!r}; the parts are {', '.join(PARTS)}")
    other = {"steps": args.steps, "seeds": args.seeds, "grid": args.rates and Grid.fixed(args.rates)}
    other = {name: value for name, value in other.items() if value}
    parts = [replace(part, **other) for name, part in PARTS.items() if name in (args.parts or PARTS)]
    results = Results(args.output, runs=[], untrained={})
    if not args.report:
        task.unpacked()
    for part in [] if args.report else parts:
        for _, run in outcomes(attempt, lambda part=part: part.missing(results.runs), args.workers):
            results.add(run)
            said = f"loss {run['loss']:.4f}, accuracy {run['accuracy']:.3f}" if "loss" in run else run["message"]
            print(
                f"[{len(part.missing(results.runs))} to go] {run['place']}, {run['phase']}: {run['arm']} at "
                f"{run['rate']:g}, seed {run['seed']}: {said}", file=sys.stderr, flush=True,
            )  # fmt: skip
    if not args.report and not results.record["untrained"]:
        results.record["untrained"] = training.untrained("report")
        results.save()
    print("\n\n".join(report(part, part.own(results.runs)) for part in parts))
    draw([(part, part.own(results.runs)) for part in parts], args.output.parent / "chat")
