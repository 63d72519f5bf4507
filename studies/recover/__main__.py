"""A quarter of a rank 16 adapter, with and without a tenth of further steps, beside the whole one: six adapters.

    python -m studies.recover             # trains what is missing, prints the table, writes it into README.md
    python -m studies.recover --report    # only the table

Each seed trains plain LoRA of rank 16 on punctuation (MiniLM-L6, 160 steps of 16), and from it come four arms: the
whole adapter, its best quarter, that quarter after 16 further steps (``ra.recover`` as it is by default), and, as the
control, the whole adapter after the same further steps. All are judged on the report split, which no choice has seen.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import rankalloc as ra
from rankalloc.experiments.runner import evaluate_saved
from rankalloc.experiments.tasks import prepare
from studies.common.paired import t_interval
from studies.recover.adapters import config_of, whole_adapter

HERE = Path(__file__).parent
RESULTS, README = HERE / "results.json", HERE / "README.md"
SEEDS = range(6)
FURTHER, SHARE = 16, 0.25
ARMS = ("whole", "cut", "cut, then steps", "whole, then steps")
COMPARED = (
    ("cut, then steps", "whole"), ("cut", "whole"), ("cut, then steps", "cut"), ("whole, then steps", "whole"),
    ("cut, then steps", "whole, then steps"),
)


def measure(seed: int) -> dict[str, Any]:
    """One adapter and what comes of it: {arm: metrics}."""
    config, began = config_of(seed), time.perf_counter()
    prepared = prepare(config)
    whole = whole_adapter(seed, prepared)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        result = ra.shrink(whole, ra.RankBudget(fraction=SHARE), folder / "cut")
        done = ra.recover(folder / "cut", config, FURTHER, folder / "cut, then steps", prepared=prepared)
        ra.recover(whole, config, FURTHER, folder / "whole, then steps", prepared=prepared)
        places = {arm: whole if arm == "whole" else folder / arm for arm in ARMS}
        found = {arm: evaluate_saved(config, prepared, path, "report").metrics for arm, path in places.items()}
    return {
        "seed": seed, "arms": found, "params": {"whole": result.params_before, "cut": result.params},
        "error": result.error, "rate": done.learning_rate, "seconds": time.perf_counter() - began,
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Means of the arms, and paired differences with 95 % t intervals, as Markdown."""
    lines = ["| adapter | parameters | F1 | loss |", "| --- | --- | --- | --- |"]
    for arm in ARMS:
        f1, loss = ([run["arms"][arm][what] for run in runs] for what in ("f1", "loss"))
        params = runs[0]["params"]["cut" if arm.startswith("cut") else "whole"]
        lines.append(f"| {arm} | {params:,} | {sum(f1) / len(f1):.4f} | {sum(loss) / len(loss):.4f} |")
    lines += ["", "| difference | F1 (95 % t interval) | loss (95 % t interval) |", "| --- | --- | --- |"]
    for one, other in COMPARED:
        cells = []
        for what in ("f1", "loss"):
            mean, low, high = t_interval([run["arms"][one][what] - run["arms"][other][what] for run in runs])
            cells.append(f"{mean:+.4f} ({low:+.4f} to {high:+.4f})")
        lines.append(f"| {one} − {other} | {cells[0]} | {cells[1]} |")
    seconds = sum(run["seconds"] for run in runs)
    lines += ["", f"{len(runs)} adapters (seeds {runs[0]['seed']} to {runs[-1]['seed']}), {seconds / 60:.0f} minutes."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for its own choice")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    runs: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for seed in [] if given.report else [seed for seed in SEEDS if seed not in {run["seed"] for run in runs}]:
        runs = sorted([*runs, measure(seed)], key=lambda run: run["seed"])
        RESULTS.write_text(json.dumps(runs, indent=1) + "\n")
        print(f"seed {seed}: {runs[-1]['seconds']:.0f} s", flush=True)
    if len(runs) > 1:
        print(table(runs))
        text = README.read_text() if README.exists() else "<!-- table -->\n<!-- end -->\n"
        README.write_text(re.sub(
            r"<!-- table -->.*<!-- end -->", f"<!-- table -->\n{table(runs)}<!-- end -->", text, flags=re.S
        ))


if __name__ == "__main__":
    main()
