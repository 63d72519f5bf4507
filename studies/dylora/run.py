"""Can one DyLoRA run stand for a LoRA run at every rank? See README.md in this folder.

    python studies/dylora/run.py [--rank 4] [--steps 480] [--seeds 3] [--workers 2] [--report]

Every run is kept in results.json and not run again. ``--report`` only draws the figure and prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RATES = (1.4e-3, 2e-3, 2.8e-3)
"""The first rates of every arm; a best one at the edge asks for the next, a factor √2 away."""
ALPHA, SCALE = 4.0, "rslora"
"""Of every run, whatever its rank: DyLoRA at rank b is LoRA of rank b with scaling ALPHA / √b."""

Key = tuple[str, int, float, int]
"""kind, rank, rate, seed"""


def one_run(kind: str, rank: int, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """Train once; tune and report losses, per-window report losses and metrics, at every rank the run can serve."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    import rankalloc as ra
    from rankalloc.experiments.tasks.base import evaluate

    torch.set_num_threads(1)
    task = ra.load_task("punctuation", data={"limit_tune": 200, "max_length": 32, "prior_bias": True})
    set_seed(seed)
    model = task.build_model()
    adapters = ra.attach(model, rank=rank, alpha=ALPHA, scale=SCALE, init="lora")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=rate, warmup_steps=steps // 10,
            lr_scheduler_type="linear", seed=seed, data_seed=seed, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False, logging_steps=steps,
        )
        callbacks = [ra.RankCallback(adapters, ra.RankBudget(fraction=1.0), "dylora")] if kind == "dylora" else []
        trainer = Trainer(
            model, arguments, train_dataset=task.splits["train"], data_collator=task.collator, callbacks=callbacks
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = time.perf_counter() - started
    evaluations = {}
    for served in range(1, rank + 1) if kind == "dylora" else [rank]:
        with ra.at_rank(adapters, served):
            tune, report = (evaluate(task, model, split, 16) for split in ("tune", "report"))
        evaluations[str(served)] = {
            "params": served * sum(adapter.params_per_rank for adapter in adapters),
            "tune": tune.metrics, "report": report.metrics, "report_losses": report.example_losses,
        }
    return {
        "kind": kind, "rank": rank, "alpha": ALPHA, "scale": SCALE, "rate": rate, "steps": steps, "seed": seed,
        "seconds": seconds, "evaluations": evaluations,
    }


def tuning_loss(run: dict[str, Any]) -> float:
    """Loss on the tune split; of a DyLoRA run the mean over the ranks it serves."""
    return float(np.mean([e["tune"]["loss"] for e in run["evaluations"].values()]))


def rate_of(runs: list[dict], kind: str, rank: int) -> float:
    """The rate with the lowest tuning loss at seed 0."""
    own = [run for run in runs if (run["kind"], run["rank"], run["seed"]) == (kind, rank, 0)]
    return min(own, key=tuning_loss)["rate"]


def wanted(runs: list[dict], rank: int, seeds: int) -> Iterator[Key]:
    """What is still to be run, as far as can be said now: rates at seed 0, then the other seeds at the best rate."""
    done = {(run["kind"], run["rank"], run["rate"], run["seed"]) for run in runs}
    for kind, own in [("dylora", rank), *(("lora", served) for served in range(rank, 0, -1))]:
        tried = sorted({rate for k, r, rate, seed in done if (k, r, seed) == (kind, own, 0)})
        missing = [rate for rate in RATES if rate not in tried]
        if missing:
            yield from ((kind, own, rate, 0) for rate in missing)
            continue
        best = rate_of(runs, kind, own)
        further = {tried[0]: best / math.sqrt(2), tried[-1]: best * math.sqrt(2)}.get(best)
        if further:
            yield kind, own, float(f"{further:.2g}"), 0
        else:
            yield from ((kind, own, best, s) for s in range(1, seeds) if (kind, own, best, s) not in done)


def complete(runs: list[dict], rank: int) -> list[dict]:
    """The runs of those seeds that every arm was run with at its best rate."""
    arms = [("dylora", rank), *(("lora", served) for served in range(1, rank + 1))]
    best = {arm: rate_of(runs, *arm) for arm in arms}
    seeds = [{r["seed"] for r in runs if (r["kind"], r["rank"], r["rate"]) == (*arm, best[arm])} for arm in arms]
    return [run for run in runs if run["seed"] in set.intersection(*seeds)]


def compare(runs: list[dict], rank: int) -> list[dict[str, Any]]:
    """Per served rank: report losses and F1 of both, seed by seed, and the paired difference of the losses with its
    standard error over seeds (that over windows of one run knows nothing of the scatter between runs)."""
    kinds = ("dylora", "lora")
    rate = rate_of(runs, "dylora", rank)
    nested = {run["seed"]: run for run in runs if (run["kind"], run["rate"]) == ("dylora", rate)}
    rows = []
    for served in range(1, rank + 1):
        own_rate = rate_of(runs, "lora", served)
        own = {r["seed"]: r for r in runs if (r["kind"], r["rank"], r["rate"]) == ("lora", served, own_rate)}
        seeds = sorted(set(nested) & set(own))
        pairs = [tuple(run[seed]["evaluations"][str(served)] for run in (nested, own)) for seed in seeds]
        differences = [one["report"]["loss"] - two["report"]["loss"] for one, two in pairs]
        mean = float(np.mean(differences))
        error = float(np.std(differences, ddof=1) / math.sqrt(len(seeds))) if len(seeds) > 1 else math.nan
        windows = np.mean([np.subtract(one["report_losses"], two["report_losses"]) for one, two in pairs], axis=0)
        rows.append({
            "rank": served, "seeds": seeds, "rates": (rate, own_rate),
            "dylora": {m: float(np.mean([one["report"][m] for one, _ in pairs])) for m in ("loss", "f1")},
            "lora": {m: float(np.mean([two["report"][m] for _, two in pairs])) for m in ("loss", "f1")},
            "losses": {kind: [pair[i]["report"]["loss"] for pair in pairs] for i, kind in enumerate(kinds)},
            "difference": mean, "standard_error": error,
            "window_error": float(windows.std(ddof=1) / math.sqrt(len(windows))),
            "within": bool(mean <= 2 * error) if math.isfinite(error) else mean <= 0,
        })
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison in Markdown."""
    lines = [
        "| rank | DyLoRA loss | LoRA loss (its rate) | difference ± standard error over seeds | over windows | "
        "DyLoRA F1 | LoRA F1 | within 2, or better |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['rank']} | {row['dylora']['loss']:.4f} | {row['lora']['loss']:.4f} ({row['rates'][1]:g}) | "
            f"{row['difference']:+.4f} ± {row['standard_error']:.4f} | ± {row['window_error']:.4f} | "
            f"{row['dylora']['f1']:.3f} | {row['lora']['f1']:.3f} | {'yes' if row['within'] else 'no'} |"
        )
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Report loss by rank, one DyLoRA run beside one LoRA run a rank, with the paired difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ranks = [row["rank"] for row in rows]
    fig, (top, below) = plt.subplots(2, 1, figsize=(6, 5.2), sharex=True, height_ratios=(2, 1), layout="constrained")
    joined = "one DyLoRA run (dots: seeds)"
    top.plot(ranks, [row["dylora"]["loss"] for row in rows], "o-", color="#0072b2", label=joined)
    top.plot(ranks, [row["lora"]["loss"] for row in rows], "s--", color="#d55e00", label="a LoRA run for each rank")
    for kind, colour in (("dylora", "#0072b2"), ("lora", "#d55e00")):
        for row in rows:
            losses = row["losses"][kind]
            top.plot([row["rank"]] * len(losses), losses, ".", color=colour, alpha=0.45, markersize=4)
    top.set_ylabel("loss on the report split (nats)")
    top.legend(frameon=False)
    below.axhline(0, color="0.5", linewidth=0.8)
    below.errorbar(
        ranks, [row["difference"] for row in rows], yerr=[2 * row["standard_error"] for row in rows], fmt="o",
        color="#0072b2", capsize=3,
    )
    below.set_ylabel("DyLoRA − LoRA\n(± 2 standard errors)")
    below.set_xlabel("rank")
    below.set_xticks(ranks)
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
    for suffix in (".png", ".svg"):
        fig.savefig(path.with_suffix(suffix), dpi=150)


def main() -> None:
    from rankalloc.files import write_json
    from rankalloc.training.environment import describe

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--seeds", type=int, default=3, help="paired seeds; rates are chosen at seed 0")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="draw and print what has finished")
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    args = parser.parse_args()

    record = json.loads(args.output.read_text()) if args.output.exists() else {"runs": []}

    def ours() -> list[dict]:
        return [run for run in record["runs"] if run["steps"] == args.steps]

    with ProcessPoolExecutor(args.workers) as pool:
        running: dict = {}
        while not args.report:
            for key in wanted(ours(), args.rank, args.seeds):
                if key not in running.values() and len(running) < args.workers:
                    kind, rank, rate, seed = key
                    running[pool.submit(one_run, kind, rank, rate, args.steps, seed)] = key
            if not running:
                break
            future = next(as_completed(running))
            del running[future]
            run = future.result()
            record["runs"].append(run)
            record["environment"] = describe("cpu").model_dump()
            write_json(args.output, record)
            shown = ", ".join(f"{e['tune']['loss']:.3f}" for e in run["evaluations"].values())
            what = f"{run['kind']} rank {run['rank']} rate {run['rate']:g} seed {run['seed']}"
            print(f"{what}: tune loss {shown}, {run['seconds']:.0f} s", flush=True)
    runs = complete(ours(), args.rank)
    if left := sorted({run["seed"] for run in ours()} - {run["seed"] for run in runs}):
        print(f"left out, since some of their runs are missing: seeds {', '.join(map(str, left))}")
    rows = compare(runs, args.rank)
    print(table(rows))
    figure(rows, HERE / "dylora")
    print(f"within 2 standard errors, or better: {sum(row['within'] for row in rows)} of {len(rows)} ranks")


if __name__ == "__main__":
    main()
