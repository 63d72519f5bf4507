"""Do adaptive ranks help on punctuation and on part-of-speech tags? See README.md in this folder.

    python -m studies.audits punctuation [--jobs 2]     # or pos, tight-punctuation, tight-pos; pos needs make brown
    python -m studies.audits stability                  # how alike the chosen ranks are, from the audits' records

An audit that was stopped goes on; one that has finished makes no run, and its record and report are written again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

import rankalloc as ra
from rankalloc.experiments.audits.audit import conduct, prepared_audit
from rankalloc.experiments.config import load_config
from rankalloc.files import write_json, write_text

from ..common.arguments import QUICK, at_least_one, parse, parser_of
from ..common.figures import save
from .figure import figure
from .stability import stability, table

HERE = Path(__file__).parent
AUDITS = ("punctuation", "pos", "tight-punctuation", "tight-pos")
_QUICK = ["training.steps=8", "audit.arms=[twin, post]", "audit.trials=3", "audit.looks=[2, 3]", "data.limit_tune=60",
          "data.limit_report=120"]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("audits", __doc__)
    parser.add_argument("name", choices=(*AUDITS, "stability"))
    parser.add_argument("--jobs", type=at_least_one, default=1, help="runs at a time (1)")
    parser.add_argument("--work", type=Path, default=Path("runs/audits"), help="where runs are kept")
    parser.add_argument("--output", type=Path, default=HERE, help="where the record goes (this folder)")
    parser.add_argument("--reports", type=Path, default=Path("reports"), help="where the page goes (reports)")
    quick = QUICK / "audits"
    args = parse(parser, argv, work=quick, output=quick / "records", reports=quick / "reports")
    if args.name != "stability":
        print(_audited(args))
    records = [ra.AuditRecord.load(path) for name in AUDITS if (path := args.output / f"{name}.json").is_file()]
    save(figure(records), args.output / "audits")
    if args.name == "stability":
        found = stability(records)
        write_json(args.output / "stability.json", found)
        print(table(found))


def _audited(args: argparse.Namespace) -> str:
    transformers.logging.set_verbosity_error()
    config = load_config(HERE / f"{args.name}.yaml", _QUICK if args.quick else [])
    command = f"python -m studies.audits {args.name}"
    prepared = prepared_audit(config, args.work / args.name, None, command)
    record = conduct(prepared, None, args.jobs, lambda line, done, most: print(f"{done}/{most}  {line}",
                                                                             file=sys.stderr, flush=True))
    for folder in (args.output, args.reports):
        folder.mkdir(parents=True, exist_ok=True)
    kept = args.output / f"{args.name}.json"
    write_text(kept, json.dumps(_relative(record.model_dump(mode="json")), indent=1) + "\n")
    ra.write_report(kept, args.reports / f"audit-{args.name}.html")
    return "\n".join([record.sentence or "", *record.details, record.advice or ""])


def _relative(tree: Any) -> Any:
    """The record with paths below the present folder written from there: it is read on other machines."""
    if isinstance(tree, dict):
        return {key: _relative(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_relative(value) for value in tree]
    return tree.replace(f"{Path.cwd()}/", "") if isinstance(tree, str) else tree


if __name__ == "__main__":
    sys.exit(main())
