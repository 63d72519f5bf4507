"""How much of a finished LoRA can go, without data, with data, and with a few more steps? See README.md here.

    python studies/shrink/run.py [--steps 160] [--seed 0] [--report]

One uniform LoRA of rank 16 is trained on punctuation at each rate, and the best by tuning loss, kept in runs/shrink, is
shrunk. Everything measured is kept in results.json and not measured again. ``--report`` only draws and prints.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RATES = (2.5e-4, 5e-4, 1e-3, 1.4e-3)
FURTHER = (1e-4, 2e-4, 4e-4)
SHARES = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)
KINDS = ("data-free", "calibrated", "inputs")
RANK, BATCH = 16, 16


def train(model, task, steps: int, rate: float, seed: int) -> None:
    """``steps`` of AdamW with clipping at norm 1 and a linear course of the rate."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate,
            warmup_steps=max(4, steps // 20), lr_scheduler_type="linear", seed=seed, data_seed=seed, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False, logging_steps=steps,
        )
        trainer = Trainer(model, arguments, train_dataset=task.splits["train"], data_collator=task.collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def measure(task, model) -> dict[str, Any]:
    """Tune and report metrics, and per report window what F1 is made of: hits, predicted marks, real marks."""
    from rankalloc.experiments.tasks.base import evaluate
    from rankalloc.layers.batches import IGNORED

    kept: list = []

    def capture(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
        kept[:] = [predicted, expected]
        return task.metrics_of(predicted, expected)

    tune = evaluate(task, model, "tune", BATCH).metrics
    report = evaluate(replace(task, metrics_of=capture), model, "report", BATCH).metrics
    ends = np.cumsum([sum(label != IGNORED for label in row["labels"]) for row in task.splits["report"]])[:-1]
    counts = [
        [int(((p == e) & (e != 0)).sum()), int((p != 0).sum()), int((e != 0).sum())]
        for p, e in zip(*(np.split(part, ends) for part in kept), strict=True)
    ]
    return {"tune": tune, "report": report, "counts": counts}


def f1(counts: np.ndarray) -> np.ndarray:
    """F1 of counts (..., windows, 3)."""
    hits, predicted, real = np.moveaxis(counts.sum(-2), -1, 0)
    return 2 * hits / np.maximum(predicted + real, 1)


def with_error(one: dict, full: dict, draws: int = 2000) -> tuple[float, float, float]:
    """(F1, its share of the full adapter's, the share's standard error): windows drawn anew, both on the same ones."""
    rows = np.random.default_rng(0).integers(0, len(full["counts"]), (draws, len(full["counts"])))
    ours, theirs = np.array(one["counts"]), np.array(full["counts"])
    shares = f1(ours[rows]) / f1(theirs[rows])
    return float(f1(ours)), float(f1(ours) / f1(theirs)), float(shares.std(ddof=1))


class Study:
    """Whatever has been measured, by name, and the means to measure the rest."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        torch.set_num_threads(args.threads)
        self.args, self.path = args, args.output
        self.record = json.loads(self.path.read_text()) if self.path.exists() else {"measured": {}}
        self.measured: dict[str, Any] = self.record["measured"]

    def once(self, name: str, work) -> dict[str, Any]:
        from rankalloc.files import write_json
        from rankalloc.training.environment import describe

        if name not in self.measured:
            started = time.perf_counter()
            found = work()
            self.measured[name] = {**found, "seconds": time.perf_counter() - started}
            self.record |= {"steps": self.args.steps, "seed": self.args.seed, "rank": RANK, "shares": SHARES}
            self.record["environment"] = describe("cpu").model_dump()
            write_json(self.path, self.record)
            shown = ", ".join(f"{s} {found[s]['f1']:.4f}" for s in ("tune", "report"))
            print(f"{name}: F1 {shown}, {self.measured[name]['seconds']:.0f} s", flush=True)
        return self.measured[name]

    def run(self) -> None:
        from transformers import set_seed

        import rankalloc as ra

        args = self.args
        task = ra.load_task("punctuation")
        for rate in args.rates:
            def full(rate=rate) -> dict:
                set_seed(args.seed)
                model = task.build_model()
                adapters = ra.attach(model, rank=RANK, alpha=2 * RANK, init="lora")
                train(model, task, args.steps, rate, args.seed)
                ra.save(adapters, args.work / f"rate-{rate:g}")
                return {**measure(task, model), "params": adapters.num_params()}

            self.once(f"full {rate:g}", full)
        best = min(args.rates, key=lambda rate: self.measured[f"full {rate:g}"]["tune"]["loss"])
        self.record["rate"] = best
        adapter = ra.FinishedAdapter(args.work / f"rate-{best:g}")
        params = self.measured[f"full {best:g}"]["params"]
        set_seed(args.seed)
        model = task.build_model()
        rows = [task.splits["train"][i : i + BATCH] for i in range(0, 16 * args.batches, BATCH)]
        metrics = {"data-free": None}

        def metric(kind: str):
            if kind not in metrics:
                batches = [task.collator(row) for row in rows]
                metrics[kind] = ra.calibrate(model, adapter.folder, batches, inputs_only=kind == "inputs")
            return metrics[kind]

        for share in SHARES[::-1]:
            for kind in KINDS:
                folder = args.work / f"{kind}-{share:g}-of-{best:g}"

                def shrunk(kind=kind, share=share, folder=folder) -> dict:
                    budget = ra.RankBudget(params=int(share * params))
                    result = ra.shrink(adapter, budget, folder, metric=metric(kind))
                    adapters = ra.load(model, folder)
                    found = measure(task, model)
                    ra.detach(adapters)
                    return {**found, "params": result.params, "error": result.error,
                            "metric_error": result.metric_error, "ranks": list(result.ranks.values())}

                self.once(f"{kind} {share:g} of {best:g}", shrunk)
        steps = args.steps // 10
        for kind in ("data-free", "calibrated"):
            for rate in FURTHER:
                def further(kind=kind, rate=rate) -> dict:
                    set_seed(args.seed + 1)
                    again = task.build_model()
                    adapters = ra.load(again, args.work / f"{kind}-0.25-of-{best:g}")
                    for each in adapters:
                        each.lam.requires_grad_(False)  # plain LoRA goes on as plain LoRA
                    train(again, task, steps, rate, args.seed + 1)
                    return {**measure(task, again), "params": adapters.num_params(), "further_steps": steps}

                self.once(f"{kind} 0.25 of {best:g} further {rate:g}", further)

def summary(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each adapter: what is kept of the full adapter's F1 on the report split."""
    measured = record["measured"]
    of = f"of {record['rate']:g}"
    full = measured[f"full {record['rate']:g}"]
    rows = [{"kind": "full", "share": 1.0, "name": "full", **_row(full, full)}]
    for kind in KINDS:
        for share in SHARES:
            if f"{kind} {share:g} {of}" in measured:
                rows.append({"kind": kind, "share": share, **_row(measured[f"{kind} {share:g} {of}"], full)})
    for kind in ("data-free", "calibrated"):
        tried = [name for name in measured if name.startswith(f"{kind} 0.25 {of} further")]
        if tried:
            name = min(tried, key=lambda name: measured[name]["tune"]["loss"])
            label = f"{kind}, then {measured[name]['further_steps']} steps at {name.split()[-1]}"
            rows.append({"kind": label, "share": 0.25, **_row(measured[name], full)})
    return rows


def _row(one: dict, full: dict) -> dict[str, Any]:
    value, kept, error = with_error(one, full)
    return {"params": one["params"], "f1": value, "kept": kept, "standard_error": error,
            "loss": one["report"]["loss"], "error": one.get("error")}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| adapter | parameters | share | F1 | of the full adapter's ± standard error | loss | ‖·‖ error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['kind']} | {r['params']:,} | {r['share']:.3f} | {r['f1']:.4f} | {r['kept']:.4f} ± "
        f"{r['standard_error']:.4f} | {r['loss']:.4f} | "
        f"{'' if r['error'] is None else format(r['error'], '.3f')} |" for r in rows
    ]
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """What is kept of the full adapter's F1 against the share of its parameters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    looks = {"data-free": ("o-", "#0072b2"), "inputs": ("^:", "#7f7f7f"), "calibrated": ("s--", "#d55e00")}
    axes.axhline(1, color="0.6", linewidth=0.8)
    for shift, (kind, (style, colour)) in zip((-0.006, 0, 0.006), looks.items(), strict=True):
        mine = [r for r in rows if r["kind"] == kind]
        axes.errorbar(
            [r["share"] + shift for r in mine], [r["kept"] for r in mine], yerr=[r["standard_error"] for r in mine],
            fmt=style, color=colour, capsize=2, label={"inputs": "weighed by inputs alone"}.get(kind, kind),
        )
    for row in [r for r in rows if "then" in r["kind"]]:
        colour = looks[row["kind"].split(",")[0]][1]
        axes.plot(row["share"] + 0.02, row["kept"], "*", color=colour, markersize=11, label=row["kind"])
    axes.set_xlabel("share of the parameters of a rank 16 LoRA")
    axes.set_ylabel("F1, share of the full adapter's")
    axes.set_xticks(SHARES, ["3/4", "1/2", "3/8", "1/4", "1/8"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150, **({"metadata": {"Date": None}} if suffix == ".svg" else {}))


def main() -> None:
    from rankalloc.files import write_json

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="of the LoRA's training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, default=32, help="training batches of 16 that calibration sees")
    parser.add_argument("--report", action="store_true", help="draw and print what has been measured")
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    parser.add_argument("--work", type=Path, default=Path("runs/shrink"), help="where adapters are kept")
    args = parser.parse_args()
    study = Study(args)
    if not args.report:
        study.run()
    rows = summary(study.record)
    study.record["summary"] = rows
    write_json(args.output, study.record)
    print(table(rows))
    figure(rows, args.output.parent / "shrink")


if __name__ == "__main__":
    main()
