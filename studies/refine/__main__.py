"""Spectral surgery on six adapters, whole and cut to a quarter, beside the control of shuffled factors.

    python -m studies.refine             # measures what is missing, prints the table, writes it into README.md
    python -m studies.refine --report    # only the table

The adapters are those of studies/recover, trained if they are not there. Sensitivities are measured on 32 training
batches; every number is of the report split.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import rankalloc as ra
from rankalloc.experiments.judging import TaskEvaluator
from rankalloc.experiments.runner import evaluate_saved
from rankalloc.experiments.tasks import prepare

from ..common.arguments import QUICK, at_least_one, parse, study_parser
from ..common.paired import t_interval
from ..common.results import Results
from ..common.table import markdown
from ..recover.adapters import config_of, whole_adapter

HERE = Path(__file__).parent
README = HERE / "README.md"
SHARE, BATCHES, SHUFFLES = 0.25, 32, 2
RULES = ("select", "gradient")


def measure(seed: int, batches: int) -> dict[str, Any]:
    """{size: {arm: metrics}} of one adapter; a shuffled arm is the mean of its shuffles."""
    config, began = config_of(seed), time.perf_counter()
    prepared = prepare(config)
    judge = TaskEvaluator(prepared, batch_size=config.training.batch_size)
    found: dict[str, dict[str, dict[str, float]]] = {}
    whole = whole_adapter(seed, prepared)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ra.shrink(whole, ra.RankBudget(fraction=SHARE), folder / "cut")

        def metrics(path: Path) -> dict[str, float]:
            seen = evaluate_saved(config, prepared, path, "report").metrics
            return {name: seen[name] for name in ("f1", "loss")}

        for size, adapter in (("whole", whole), ("a quarter", folder / "cut")):
            arms = found[size] = {"as it was": metrics(adapter)}
            seen = ra.sensitivities(judge.model, adapter, judge.batches(batches))
            for rule in RULES:
                out = folder / f"{size} {rule}"
                ra.refine(adapter, seen, out, rule=rule)
                arms[rule] = metrics(out)
                several = []
                for shuffle in range(SHUFFLES):
                    ra.refine(adapter, seen, folder / f"{size} {rule} {shuffle}", rule=rule, shuffled=shuffle)
                    several.append(metrics(folder / f"{size} {rule} {shuffle}"))
                arms[f"{rule}, shuffled"] = {
                    name: statistics.fmean(one[name] for one in several) for name in several[0]
                }
    return {"seed": seed, "batches": batches, "sizes": found, "seconds": time.perf_counter() - began}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Means of the arms, and paired differences with 95 % t intervals, as Markdown."""
    parts = []
    for size in runs[0]["sizes"]:
        rows = []
        for arm in runs[0]["sizes"][size]:
            cells = [arm]
            for name in ("f1", "loss"):
                values = [run["sizes"][size][arm][name] for run in runs]
                cells.append(f"{statistics.fmean(values):.4f}")
                others = ["as it was"] if arm != "as it was" else []
                others += [f"{arm}, shuffled"] if arm in RULES else []
                for other in ("as it was", f"{arm}, shuffled"):
                    if other not in others:
                        cells.append("")
                        continue
                    theirs = [run["sizes"][size][other][name] for run in runs]
                    mean, low, high = t_interval([a - b for a, b in zip(values, theirs, strict=True)])
                    cells.append(f"{mean:+.4f} ({low:+.4f} to {high:+.4f})")
            rows.append(cells)
        header = (size, "F1", "less as it was", "less shuffled", "loss", "less as it was", "less shuffled")
        parts.append(markdown(header, rows))
    return "\n\n".join(parts) + f"\n\n{len(runs)} adapters, {runs[0]['batches']} batches each.\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(HERE, __doc__, workers=False)
    parser.add_argument("--seeds", type=at_least_one, default=6, help="adapters (6)")
    parser.add_argument("--batches", type=at_least_one, default=BATCHES, help=f"for the gradients ({BATCHES})")
    args = parse(parser, argv, seeds=2, batches=2, output=QUICK / "refine" / "results.json")
    results = Results(args.output, threads=torch.get_num_threads())
    have = {run["seed"] for run in results.runs}
    for seed in [] if args.report else [seed for seed in range(args.seeds) if seed not in have]:
        results.add(measure(seed, args.batches))
        print(f"seed {seed}: {results.runs[-1]['seconds']:.0f} s", flush=True)
    runs = sorted(results.runs, key=lambda run: run["seed"])
    if len(runs) < 2:
        return print("nothing to compare yet: two adapters are needed")
    print(table(runs))
    if args.output == HERE / "results.json":
        text = README.read_text()
        README.write_text(re.sub(
            r"<!-- table -->.*<!-- end -->", lambda _: f"<!-- table -->\n{table(runs)}<!-- end -->", text, flags=re.S
        ))


if __name__ == "__main__":
    main()
