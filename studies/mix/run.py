"""Does a router over finished adapters beat one adapter for all, and LoRA bottlenecks? See README.md in this folder.

    python -m studies.mix [routing] [bottleneck] [--seeds 3] [--workers 2] [--report] [--quick]

Everything measured is kept in results.json and not measured again. ``--report`` only prints the tables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.arguments import QUICK, at_least_one, parse, study_parser
from ..common.part import Cell, recorded
from ..common.pool import outcomes
from ..common.results import Results
from .analysis import bottleneck_tables, routing_table
from .bottleneck import PART
from .routing import SHARES, Routing

HERE = Path(__file__).parent
PARTS = ("routing", "bottleneck")


def attempt(cell: Cell) -> dict[str, Any]:
    """A run's record; see :func:`studies.common.part.recorded`."""
    return recorded(PART.run, cell)


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(HERE, __doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: both")
    parser.add_argument("--seeds", type=at_least_one, default=3, help="of the adapters and routers of part routing (3)")
    parser.add_argument("--adapter-steps", type=at_least_one, default=120)
    parser.add_argument("--router-steps", type=at_least_one, default=60)
    parser.add_argument("--adapter-rates", type=float, nargs="+", default=(1e-3, 2e-3))
    parser.add_argument("--router-rates", type=float, nargs="+", default=(1e-2, 3e-2))
    parser.add_argument("--steps", type=at_least_one, default=PART.steps, help="of a run of part bottleneck")
    parser.add_argument("--judges", type=at_least_one, default=PART.seeds, help="paired seeds of part bottleneck (6)")
    parser.add_argument("--threads", type=at_least_one, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/mix"), help="where adapters are kept")
    args = parse(
        parser, argv, seeds=1, adapter_steps=24, router_steps=12, adapter_rates=[2e-3], router_rates=[1e-2], steps=8,
        judges=1, output=QUICK / "mix" / "results.json", work=QUICK / "mix",
    )  # fmt: skip
    if wrong := [name for name in args.parts if name not in PARTS]:
        parser.error(f"there is no part {wrong[0]!r}; the parts are {', '.join(PARTS)}")
    results = Results(args.output, args.threads, measured={}, runs=[])
    part, wanted = replace(PART, steps=args.steps, seeds=args.judges), args.parts or PARTS
    if "routing" in wanted and not args.report:
        Routing(args, results).run()
    for _, run in outcomes(attempt, lambda: part.missing(results.runs), args.workers) if (
        "bottleneck" in wanted and not args.report
    ) else ():  # fmt: skip
        results.add(run)
        said = run.get("message") or f"loss {run['loss']:.4f}"
        print(f"[{len(part.missing(results.runs))} to go] {run['arm']} at {run['rate']:g}: {said}", file=sys.stderr)
    for share in SHARES if "routing" in wanted else ():
        print(f"{share:.0%} of both adapters' parameters\n\n{routing_table(results.record['measured'], share)}\n")
    if "bottleneck" in wanted:
        print(bottleneck_tables(part, part.own(results.runs)))
