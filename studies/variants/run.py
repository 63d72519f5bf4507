"""Do LoRA's variants reach plain LoRA on a task where rank matters? See README.md in this folder.

    python studies/variants/run.py [--rank 4] [--steps 96] [--seeds 5] [--workers 2] [--report]

Every run is kept in results.json and not run again. ``--report`` only prints the tables and draws the figure.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REFERENCE = "LoRA"
FIRST_SEED = 100
"""The seeds that judge are none of those that choose a rate, which count from 0."""
MOST_EXTENSIONS = 3

ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"rates": (2e-3, 4e-3, 8e-3)},
    "rsLoRA": {"rates": (2e-3, 4e-3, 8e-3), "adapter.scale": "rslora"},
    "LoRA+": {"rates": (2.5e-4, 5e-4, 1e-3), "training.plus_ratio": 16.0},
    "LoRA-FA": {"rates": (4e-3, 8e-3, 1.6e-2), "adapter.init": "lora-fa"},
    "LoRA-FA, rank × 2": {"rates": (4e-3, 8e-3, 1.6e-2), "adapter.init": "lora-fa", "times": 2},
    "VeRA, rank 256": {
        "rates": (2e-3, 4e-3, 8e-3), "adapter.init": "vera", "training.plus_ratio": 10.0, "rank": 256, "alpha": 256.0,
    },
    "auto": {"rates": (4e-3, 8e-3, 1.6e-2), "method": "auto", "times": 2},
    "auto, ranks uniform": {
        "rates": (4e-3, 8e-3, 1.6e-2), "method": "auto", "method_options": {"placement": "uniform"}, "times": 2,
    },
}  # fmt: skip
"""What sets each arm off plain LoRA of the study's rank at alpha / rank = 2, and the rates it is tried at first:
configuration keys, "times" for the rank at the start as a multiple, "rank" and "alpha" where they are its own. Rates
are those of Q and of the task's head; P, Λ and VeRA's vectors have "training.plus_ratio" times them."""


@functools.cache
def prepared() -> Any:
    """The task, once in each process."""
    import rankalloc as ra

    return ra.load_task("punctuation", data={"limit_tune": 200, "max_length": 32, "prior_bias": True})


def configuration(arm: str, rank: int, rate: float, steps: int, seed: int) -> Any:
    """The arm's configuration; what it may spend at the end is what uniform LoRA of ``rank`` has, if it chooses."""
    from rankalloc.experiments.config import RunConfig
    from rankalloc.methods.planners.planning import layer_shapes

    own = dict(ARMS[arm])
    start = own.pop("rank", rank * own.pop("times", 1))
    values = {
        "name": "variants", "method": "uniform", "seed": seed, "training.steps": steps, "training.learning_rate": rate,
        "training.eval_batch_size": 16, "training.warmup_steps": 10, "data.prior_bias": True,
        "data.limit_tune": 200, "data.max_length": 32,
        "adapter.rank": start, "adapter.alpha": own.pop("alpha", 2.0 * start), "budget.fraction": 1.0,
        **{key: value for key, value in own.items() if key != "rates"},
    }  # fmt: skip
    if values["method"] == "auto":
        per_rank = sum(shape.params_per_rank for shape in layer_shapes(prepared().build_model(), 1))
        values |= {
            "budget.fraction": None, "budget.params": rank * per_rank, "budget.every": 4, "budget.freeze": 0.4,
        }
    return RunConfig().replaced(values)


def one_run(phase: str, arm: str, rank: int, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """Train and evaluate once: phase "rates" on the tune split, "seeds" on the report split.

    A run that diverges has a "message" and no metrics.
    """
    import torch

    from rankalloc.errors import RankallocError
    from rankalloc.experiments.runner import attach_for, train

    torch.set_num_threads(1)
    config, split = configuration(arm, rank, rate, steps, seed), {"rates": "tune", "seeds": "report"}[phase]
    record = {"phase": phase, "arm": arm, "rank": rank, "rate": rate, "steps": steps, "seed": seed}
    adapters, _ = attach_for(config, prepared().build_model(), prepared())
    record |= {"trained_peak": adapters.trainable_params(), "data": prepared().fingerprint}
    chooses = config.method == "auto"
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            trace = train(config, Path(folder), prepared=prepared(), splits=(split,))
    except RankallocError as error:
        if type(error) is not RankallocError:  # a mistake in the settings, not an outcome
            raise
        return {**record, "message": str(error), "seconds": round(time.perf_counter() - started, 1)}
    live = trace.adapter_params_final + sum(trace.final_ranks) if chooses else record["trained_peak"]
    return {
        **record, "trained_final": live, "file_params": trace.adapter_params_final, split: trace.evaluations[0].metrics,
        "step_seconds": trace.step_seconds_after_freeze, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def tune_losses(runs: Sequence[dict], arm: str, seeds: int) -> dict[float, float]:
    """{rate: mean tuning loss} of the rates with ``seeds`` runs; infinite where one of them diverged."""
    found: dict[float, list[float]] = {}
    for run in runs:
        if (run["phase"], run["arm"]) == ("rates", arm):
            found.setdefault(run["rate"], []).append(run["tune"]["loss"] if "tune" in run else math.inf)
    return {rate: statistics.fmean(losses) for rate, losses in sorted(found.items()) if len(losses) >= seeds}


def best_rate(losses: dict[float, float]) -> float | None:
    """The rate of the lowest tuning loss, of equals the lower; None when there is none."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: (finite[rate], rate), default=None)


def missing(runs: Sequence[dict], args: argparse.Namespace) -> list[tuple]:
    """What is still to be run, as far as is known by now: a grid grows while its best rate lies at its edge, and
    the seeds of an arm wait for its rate."""
    done = {(r["phase"], r["arm"], r["rate"], r["seed"]) for r in runs}
    cells = []
    for arm in args.arms:
        first = ARMS[arm]["rates"]
        losses = tune_losses(runs, arm, args.rate_seeds)
        rates = sorted({*first, *losses})
        complete, best = all(rate in losses for rate in first), best_rate(losses)
        extended = len(rates) - len(first)
        if complete and best is not None and best in (rates[0], rates[-1]) and extended < MOST_EXTENSIONS:
            rates.append(2 * best if best == rates[-1] else best / 2)
            complete = False
        cells += [("rates", arm, rate, seed) for rate in rates for seed in range(args.rate_seeds)]
        if complete and best is not None:
            cells += [("seeds", arm, best, FIRST_SEED + seed) for seed in range(args.seeds)]
    return [cell for cell in cells if cell not in done]


def judged(runs: Sequence[dict], arm: str, rate_seeds: int) -> dict[int, dict]:
    """{seed: run} of the arm at its chosen rate, on the report split."""
    rate = best_rate(tune_losses(runs, arm, rate_seeds))
    mine = [r for r in runs if (r["phase"], r["arm"], r["rate"]) == ("seeds", arm, rate) and "report" in r]
    return {run["seed"]: run for run in mine}


def compare(runs: Sequence[dict], arms: Sequence[str], rate_seeds: int) -> list[dict[str, Any]]:
    """Per arm: means on the report split, sizes, and the paired advantage over plain LoRA (above zero is better)."""
    from rankalloc.experiments.paired import paired_difference

    reference, rows = judged(runs, REFERENCE, rate_seeds), []
    for arm in arms:
        own, losses = judged(runs, arm, rate_seeds), tune_losses(runs, arm, rate_seeds)
        if not own:
            continue
        any_run = next(iter(own.values()))
        row = {
            "arm": arm, "rate": any_run["rate"], "rates": sorted(losses), "seeds": len(own),
            "edge": any_run["rate"] in (min(losses), max(losses)),
            **{key: max(run[key] for run in own.values()) for key in ("trained_peak", "trained_final", "file_params")},
            **{name: statistics.fmean(run["report"][name] for run in own.values()) for name in ("loss", "f1")},
        }  # fmt: skip
        pairs = sorted(own.keys() & reference.keys())
        for name, sign in (("f1", 1.0), ("loss", -1.0)):
            if arm != REFERENCE and len(pairs) > 1:
                values = [[sign * side[seed]["report"][name] for seed in pairs] for side in (own, reference)]
                row[f"{name} advantage"] = {**paired_difference(*values), "seeds": len(pairs)}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison in Markdown."""
    lines = [
        "| arm | rate (tried) | trained at the peak | at the end | in the file | F1 | loss | F1 against LoRA "
        "(95 % interval) | loss against LoRA (95 % interval) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        tried = ", ".join(f"{rate:g}" for rate in row["rates"])
        cells = [row["arm"], f"{row['rate']:g}{' at an edge' if row['edge'] else ''} ({tried})"]
        cells += [f"{row[key]:,}" for key in ("trained_peak", "trained_final", "file_params")]
        cells += [f"{row[name]:.4f}" for name in ("f1", "loss")]
        cells += [_shown(row.get(f"{name} advantage")) for name in ("f1", "loss")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(advantage: dict[str, float] | None) -> str:
    if advantage is None:
        return "–"
    return f"{advantage['difference']:+.4f} ({advantage['low']:+.4f} to {advantage['high']:+.4f})"


def sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One plain sentence an arm."""
    found = []
    for row in rows:
        advantage = row.get("f1 advantage")
        if advantage is None:
            continue
        span = f"95 % interval {advantage['low']:+.4f} to {advantage['high']:+.4f}"
        if advantage["low"] <= 0 <= advantage["high"]:
            said = f"no difference to plain LoRA in F1 was shown, the interval covers zero ({span})"
        else:
            word = "above" if advantage["difference"] > 0 else "below"
            said = f"{abs(advantage['difference']):.4f} {word} plain LoRA in F1 ({span}, p {advantage['p_value']:.3f})"
        found.append(f"{row['arm']}, {advantage['seeds']} paired seeds: {said}.")
    return found


def figure(rows: Sequence[dict[str, Any]], stem: Path) -> None:
    """Each arm's advantage over plain LoRA in F1 and in loss, with its interval; hollow where that covers zero."""
    import matplotlib
    from matplotlib.figure import Figure

    from rankalloc.files import replacing

    shown = [row for row in rows if "f1 advantage" in row][::-1]
    if not shown:
        return
    drawn = Figure(figsize=(8.2, 1.2 + 0.36 * len(shown)), dpi=150)
    for ax, name in zip(drawn.subplots(1, 2, sharey=True), ("f1", "loss"), strict=True):
        ax.axvline(0, color="#222222", linewidth=0.9)
        for y, row in enumerate(shown):
            found = row[f"{name} advantage"]
            low, high = found["low"], found["high"]
            color = "#8a8a8a" if "uniform" in row["arm"] else "#1f5fa8"
            ax.plot([low, high], [y, y], color=color, linewidth=1.6, solid_capstyle="butt")
            ax.plot(found["difference"], y, "o", color=color, markersize=5, mfc="white" if low <= 0 <= high else color)
        ax.set_yticks(range(len(shown)), [row["arm"] for row in shown], fontsize=8)
        ax.tick_params(axis="x", labelsize=8)
        ax.locator_params(axis="x", nbins=5)
        ax.set_xlabel({"f1": "advantage over plain LoRA in F1", "loss": "advantage in loss (nats)"}[name], fontsize=8)
        ax.grid(axis="x", color="#dddddd", linewidth=0.5)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    drawn.tight_layout()
    with matplotlib.rc_context({"svg.hashsalt": "rankalloc", "svg.fonttype": "none"}):
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            with replacing(stem.with_suffix(f".{ending}")) as temporary:
                drawn.savefig(temporary, format=ending, metadata=metadata)


def execute(cells: Sequence[tuple], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The runs of ``cells``, as they finish."""
    calls = [(phase, arm, args.rank, rate, args.steps, seed) for phase, arm, rate, seed in cells]
    if args.workers == 1:
        yield from (one_run(*call) for call in calls)
        return
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(one_run, *call) for call in calls]):
            yield future.result()


def main(argv: Sequence[str] | None = None) -> None:
    from rankalloc.files import write_json
    from rankalloc.training.environment import describe

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=4, help="of plain LoRA, whose size the other arms meet")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=5, help="paired seeds that judge")
    parser.add_argument("--rate-seeds", type=int, default=1, help="seeds that choose a rate")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing: print and draw what has finished")
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    args = parser.parse_args(argv)

    record = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {"runs": []}

    def mine() -> list[dict]:
        return [run for run in record["runs"] if (run["rank"], run["steps"]) == (args.rank, args.steps)]

    while not args.report and (todo := missing(mine(), args)):
        for count, run in enumerate(execute(todo, args), start=1):
            record["runs"].append(run)
            record["environment"] = {**describe("cpu").model_dump(), "threads": 1}
            write_json(args.output, record)
            values = run.get("report") or run.get("tune")
            said = f"F1 {values['f1']:.4f}, loss {values['loss']:.4f}" if values else "diverged"
            what = f"{run['phase']}: {run['arm']} rate {run['rate']:g} seed {run['seed']}"
            print(f"[{count}/{len(todo)}] {what}: {said}, {run['seconds']:.0f} s", file=sys.stderr, flush=True)
    rows = compare(mine(), args.arms, args.rate_seeds)
    print(table(rows))
    print("\n" + "\n".join(f"- {sentence}" for sentence in sentences(rows)))
    figure(rows, args.output.parent / "variants")


if __name__ == "__main__":
    main()
