"""Which method finds ranks that are known? See README.md in this folder.

    python studies/planted/run.py [--variants main half] [--seeds 5] [--methods adalora ...] [--workers 2]

Each (variant, architecture, method, seed) is one training run; finished ones are kept in the JSON file and
not run again, so the study can be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from problems import ARCHITECTURES, plant
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.environment import describe
from rankalloc.files import write_json

HERE = Path(__file__).parent
VARIANTS = {
    "main": {},
    "half": {"spectrum": "decaying"},
    "decaying": {"spectrum": "decaying"},
    "correlated": {"correlated": True},
    "noise": {"noise": 0.1},
}
METHODS = [*ra.METHODS, "singular-value/uniform"]
RANK, STEPS = 12, 2000


def run(variant: str, architecture: str, method: str, seed: int, rate: float = 1e-2) -> dict:
    """Train one student and hold its ranks and its function against the teacher's."""
    torch.set_num_threads(1)
    problem = plant(architecture, seed, **VARIANTS[variant])
    planted = sum(problem.ranks.values())
    total = planted // 2 if variant == "half" else planted
    student, started = copy.deepcopy(problem.base), time.perf_counter()
    torch.manual_seed(1000 + seed)
    name, _, placement = method.partition("/")
    budget = ra.RankBudget(ranks=total, warmup=0.2, freeze=0.4, every=20)
    chosen = ra.METHODS[name]
    if chosen.when == "before":
        ranks = ra.plan_ranks(student, None, budget, name, rank=RANK)
        adapters = ra.attach(student, rank=RANK, alpha=RANK, ranks=ranks, init=chosen.init)
    else:
        adapters = ra.attach(student, rank=RANK, alpha=RANK, init=chosen.init)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=rate)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 if step < 0.6 * STEPS else max(1e-3, (1 - step / STEPS) / 0.4) ** 1.5
    )
    options = {"placement": placement} if placement else {}
    controller = ra.RankController(adapters, budget, STEPS, name, **options)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        x, y = problem.batch(generator)
        F.mse_loss(student(x), y).backward()
        controller.observe()
        optimizer.step()
        controller.update(optimizer)
        optimizer.zero_grad()
        decay.step()
    ranks = adapters.ranks()
    wrong = sum(abs(ranks[layer] - rank) for layer, rank in problem.ranks.items())
    return {
        "variant": variant, "architecture": architecture, "method": method, "seed": seed, "rate": rate,
        "planted": planted, "budget": total, "ranks": ranks,
        "exact": sum(ranks[layer] == rank for layer, rank in problem.ranks.items()) / len(ranks),
        "misplaced": (wrong - (planted - total)) / 2 / total,
        "relative_error": problem.relative_error(student), "seconds": time.perf_counter() - started,
    }


def table(runs: list[dict]) -> str:
    """One Markdown row a variant, architecture and method: means over seeds, error as the median."""
    lines = ["| variant | network | method | seeds | layers exact | ranks misplaced | relative error |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    groups: dict[tuple, list[dict]] = {}
    for item in sorted(runs, key=lambda r: (list(VARIANTS).index(r["variant"]), r["architecture"], r["method"])):
        groups.setdefault((item["variant"], item["architecture"], item["method"]), []).append(item)
    for (variant, architecture, method), items in groups.items():
        exact = "–" if variant == "half" else f"{statistics.mean(r['exact'] for r in items):.1%}"
        misplaced = statistics.mean(r["misplaced"] for r in items)
        errors = [r["relative_error"] for r in items]
        lines.append(
            f"| {variant} | {architecture} | {method} | {len(items)} | {exact} | {misplaced:.1%} | "
            f"{statistics.median(errors):.1e} (worst {max(errors):.1e}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["main", "half"])
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    args = parser.parse_args()

    record = json.loads(args.output.read_text()) if args.output.exists() else {"runs": []}
    done = {(r["variant"], r["architecture"], r["method"], r["seed"]) for r in record["runs"]}
    wanted = [
        (variant, architecture, method, seed) for seed in range(args.seeds) for variant in args.variants
        for architecture in args.architectures for method in args.methods
    ]
    todo = [key for key in wanted if key not in done]
    with ProcessPoolExecutor(args.workers) as pool:
        futures = [pool.submit(run, *key) for key in todo]
        for count, future in enumerate(as_completed(futures), start=1):
            item = future.result()
            record["runs"].append(item)
            record["environment"] = describe("cpu").model_dump()
            write_json(args.output, record)
            print(
                f"[{count}/{len(todo)}] {item['variant']} {item['architecture']} {item['method']} seed {item['seed']}: "
                f"{item['exact']:.0%} exact, error {item['relative_error']:.1e}, {item['seconds']:.0f} s", flush=True,
            )
    print(table(record["runs"]))


if __name__ == "__main__":
    main()
