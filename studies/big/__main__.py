"""What the big models' configurations need: their data, and the memory that they take. See README.md in this folder.

    python -m studies.big data gsm8k --from downloads/gsm8k --to runs/big       # or commonsense, metamath
    python -m studies.big sizes                                                 # parameters and memory, by formula
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rankalloc.errors import DataError
from rankalloc.experiments.config import load_config

from ..common.arguments import at_least_one
from .data import PROMPT, SETS, Asked
from .shapes import table

HERE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.big", description=str(__doc__).splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="turn a downloaded set into train, tune and report")
    data.add_argument("set", choices=SETS)
    data.add_argument("--from", dest="source", type=Path, required=True, help="the folder that was downloaded")
    data.add_argument("--to", type=Path, default=Path("runs/big"), help="where the set's folder is made (runs/big)")
    data.add_argument("--tune", type=at_least_one, default=500, help="questions held out of train to tune by (500)")
    data.add_argument("--each", type=int, default=500, help="questions of each commonsense test; 0 for all (500)")
    data.add_argument("--template", default=PROMPT, help=f"prompt of a mathematical question ({PROMPT!r})")
    commands.add_parser("sizes", help="parameters and memory of every configuration, by formula")
    args = parser.parse_args(argv)
    if args.command == "sizes":
        print(table(load_config(path) for path in sorted(HERE.glob("*.yaml"))))
        return
    if "{question}" not in args.template or args.each < 0:
        data.error("--template should hold {question}, and --each a number of at least 0")
    asked = Asked(args.tune, args.each, args.template.replace("\\n", "\n"))
    try:
        for done in SETS[args.set](args.source, args.to, asked):
            print(done)
    except DataError as error:
        data.error(str(error))


if __name__ == "__main__":
    main()
