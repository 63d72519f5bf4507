"""The command line that all studies have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUICK = Path("runs/quick")


def at_least_one(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def parser_of(command: str, doc: str) -> argparse.ArgumentParser:
    """The parser of ``python -m studies.<command>``, with ``--quick``; ``doc`` is that of its module."""
    parser = argparse.ArgumentParser(prog=f"python -m studies.{command}", description=doc.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true",
        help=f"a few minutes: the smallest setting that does all there is, written under {QUICK}",
    )  # fmt: skip
    return parser


def study_parser(folder: Path, doc: str, workers: bool = True) -> argparse.ArgumentParser:
    """The parser of a study that keeps its runs in ``folder``/results.json."""
    parser = parser_of(folder.name, doc)
    parser.add_argument("--report", action="store_true", help="run nothing: print and draw what has finished")
    if workers:
        parser.add_argument("--workers", type=at_least_one, default=2, help="processes, of one thread each (2)")
    parser.add_argument("--output", type=Path, default=folder / "results.json", help="finished runs (results.json)")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, **quick: Any) -> argparse.Namespace:
    """The arguments in ``argv``, by default those of the process.

    Args:
        quick: defaults under ``--quick``; an option that is given goes first.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if "--quick" in words:
        parser.set_defaults(**quick)
    return parser.parse_args(words)
