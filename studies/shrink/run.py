"""How much of a finished LoRA can go, without data, with data, and with a few more steps? See README.md in this folder.

    python -m studies.shrink [--steps 160] [--seed 0] [--report] [--quick]

One uniform LoRA of rank 16 is trained on punctuation at each rate. The one with the lowest tuning loss is kept in
runs/shrink and shrunk. Everything measured is kept in results.json and not measured again. ``--report`` only draws and
prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..common.arguments import QUICK, at_least_one, parse, study_parser
from ..common.results import Results
from .analysis import summary, table
from .figure import draw
from .measuring import FURTHER_SHARE, Study

HERE = Path(__file__).parent
RATES = (2.5e-4, 5e-4, 1e-3, 1.4e-3)
FURTHER = (1e-4, 2e-4, 4e-4)
SHARES = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(HERE, __doc__, workers=False)
    parser.add_argument("--steps", type=at_least_one, default=160)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="tried for the LoRA's training")
    parser.add_argument("--further", type=float, nargs="+", default=FURTHER, help="tried for the further steps")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=SHARES, help=f"of the parameters; {FURTHER_SHARE} is always added"
    )
    parser.add_argument("--short", action="store_true", help="the short punctuation task of variants and dylora")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=at_least_one, default=1)
    parser.add_argument("--batches", type=at_least_one, default=32, help="training batches that calibration sees")
    parser.add_argument("--work", type=Path, default=Path("runs/shrink"), help="where adapters are kept")
    args = parse(
        parser, argv, short=True, steps=20, rates=[4e-3], further=[2e-4], shares=[FURTHER_SHARE], batches=2,
        output=QUICK / "shrink" / "results.json", work=QUICK / "shrink",
    )  # fmt: skip
    args.shares = sorted({*args.shares, FURTHER_SHARE}, reverse=True)
    results = Results(args.output, args.threads, measured={})
    if not args.report:
        Study(args, results).run()
    rows = results.record["summary"] = summary(results.record)
    results.save()
    print(table(rows))
    draw(rows, args.output.parent / "shrink")
