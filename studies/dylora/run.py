"""Can one DyLoRA run stand for a LoRA run at every rank? See README.md in this folder.

    python studies/dylora/run.py [--rank 8] [--steps 96] [--workers 2] [--report]

Every run is kept in results.json and not run again. ``--report`` only draws the figure and prints the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RATES = {"lora": (1.4e-3, 2.8e-3, 4e-3), "dylora": (1e-3, 2e-3, 4e-3)}
SCALING = 2.0
"""alpha / rank of every separate LoRA run; DyLoRA's alpha is the same multiple of its top rank."""


def one_run(kind: str, rank: int, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """Train once; tune and report losses, per-window report losses and metrics, at every rank the run can serve."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    import rankalloc as ra
    from rankalloc.tasks.base import evaluate

    torch.set_num_threads(1)
    task = ra.load_task("punctuation", data={"limit_tune": 200, "max_length": 32})
    set_seed(seed)
    model = task.build_model()
    adapters = ra.attach(model, rank=rank, alpha=SCALING * rank, init="lora")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=rate, warmup_steps=4,
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
        "kind": kind, "rank": rank, "rate": rate, "steps": steps, "seed": seed, "seconds": seconds,
        "evaluations": evaluations,
    }


def best(runs: list[dict], kind: str, rank: int) -> dict:
    """The run of the rate with the lowest tuning loss; DyLoRA's is the mean over the ranks it serves."""
    def tuning_loss(run: dict) -> float:
        return float(np.mean([e["tune"]["loss"] for e in run["evaluations"].values()]))

    return min((run for run in runs if run["kind"] == kind and run["rank"] == rank), key=tuning_loss)


def compare(runs: list[dict], rank: int) -> list[dict[str, Any]]:
    """Per served rank: report losses of both, and their paired difference over windows with its standard error."""
    nested = best(runs, "dylora", rank)
    rows = []
    for served in range(1, rank + 1):
        own = best(runs, "lora", served)
        one, two = (r["evaluations"][str(served)] for r in (nested, own))
        difference = np.asarray(one["report_losses"]) - np.asarray(two["report_losses"])
        error = float(difference.std(ddof=1) / np.sqrt(len(difference)))
        rows.append({
            "rank": served, "dylora": one["report"], "lora": two["report"], "rates": (nested["rate"], own["rate"]),
            "difference": float(difference.mean()), "standard_error": error,
            "within": bool(difference.mean() <= 2 * error),
        })
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison in Markdown."""
    lines = [
        "| rank | DyLoRA loss | LoRA loss | difference ± standard error | DyLoRA F1 | LoRA F1 | within 2, or better |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['rank']} | {row['dylora']['loss']:.4f} | {row['lora']['loss']:.4f} (rate {row['rates'][1]:g}) | "
            f"{row['difference']:+.4f} ± {row['standard_error']:.4f} | {row['dylora']['f1']:.3f} | "
            f"{row['lora']['f1']:.3f} | {'yes' if row['within'] else 'no'} |"
        )
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Report loss by rank, one DyLoRA run beside one LoRA run a rank, with the paired difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ranks = [row["rank"] for row in rows]
    fig, (top, below) = plt.subplots(2, 1, figsize=(6, 5.2), sharex=True, height_ratios=(2, 1), layout="constrained")
    top.plot(ranks, [row["dylora"]["loss"] for row in rows], "o-", color="#0072b2", label="one DyLoRA run")
    top.plot(ranks, [row["lora"]["loss"] for row in rows], "s--", color="#d55e00", label="a LoRA run for each rank")
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
    from rankalloc.environment import describe
    from rankalloc.files import write_json

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", help="of DyLoRA, instead of its usual ones")
    parser.add_argument("--only", choices=RATES, help="only the runs of one kind")
    parser.add_argument("--report", action="store_true", help="draw and print what has finished")
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    args = parser.parse_args()

    record = json.loads(args.output.read_text()) if args.output.exists() else {"runs": []}
    wanted = [("dylora", args.rank, rate) for rate in args.rates or RATES["dylora"]]
    wanted += [("lora", rank, rate) for rank in range(1, args.rank + 1) for rate in RATES["lora"]]
    done = {(r["kind"], r["rank"], r["rate"], r["steps"], r["seed"]) for r in record["runs"]}
    todo = [key for key in wanted if (*key, args.steps, args.seed) not in done and args.only in (None, key[0])]
    if not args.report and todo:
        with ProcessPoolExecutor(args.workers) as pool:
            futures = [pool.submit(one_run, *key, args.steps, args.seed) for key in todo]
            for count, future in enumerate(as_completed(futures), start=1):
                run = future.result()
                record["runs"].append(run)
                record["environment"] = describe("cpu").model_dump()
                write_json(args.output, record)
                shown = ", ".join(f"{e['tune']['loss']:.3f}" for e in run["evaluations"].values())
                what = f"{run['kind']} rank {run['rank']} rate {run['rate']:g}"
                print(f"[{count}/{len(todo)}] {what}: tune loss {shown}, {run['seconds']:.0f} s", flush=True)
    runs = [run for run in record["runs"] if (run["steps"], run["seed"]) == (args.steps, args.seed)]
    rows = compare(runs, args.rank)
    print(table(rows))
    figure(rows, HERE / "dylora")
    print(f"within 2 standard errors, or better: {sum(row['within'] for row in rows)} of {len(rows)} ranks")


if __name__ == "__main__":
    main()
