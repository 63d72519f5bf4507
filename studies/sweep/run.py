"""Does the default sweep find as good a run as random and grid search, in fewer steps? See README.md in this folder.

    python -m studies.sweep [--seeds 3] [--workers 2] [--report] [--quick]
    python -m studies.sweep overhead        # the time of a trial outside training and evaluation

Searches that have finished are in results.json and are not repeated. ``--report`` only prints and draws.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..common.arguments import QUICK, at_least_one, parse, study_parser
from ..common.figures import BLUE, GREY, ORANGE, save
from ..common.pool import outcomes
from ..common.results import Results
from ..common.table import markdown
from .overhead import shares
from .searches import TRIALS, Cell, search

HERE = Path(__file__).parent
SEARCHES = {"sweep": BLUE, "random": ORANGE, "grid": GREY}


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(HERE, __doc__)
    parser.add_argument("part", nargs="?", choices=("searches", "overhead"), default="searches")
    parser.add_argument("--seeds", type=at_least_one, default=3, help="of every search (3)")
    parser.add_argument("--steps", type=at_least_one, default=60, help="of a run (60)")
    parser.add_argument("--trials", type=at_least_one, default=TRIALS, help=f"of a search ({TRIALS})")
    parser.add_argument("--work", type=Path, default=Path("runs/sweeps"), help="where runs are kept")
    args = parse(
        parser, argv, seeds=1, steps=20, trials=6, output=QUICK / "sweep" / "results.json", work=QUICK / "sweep"
    )
    results = Results(args.output, 1, searches={})
    if args.part == "overhead":
        if not args.report:
            searched = results.record.get("environment")
            results.record["overhead"] = shares(args.work / "overhead", quick=args.quick)
            results.stamp()
            # the searches may have been made elsewhere
            results.record["overhead environment"] = results.record.pop("environment")
            results.record |= {} if searched is None else {"environment": searched}
            results.save()
        print(overhead_text(results.record["overhead"]))
        return
    cells = [
        Cell(name, seed, args.steps, args.trials, args.work) for seed in range(args.seeds) for name in SEARCHES
    ]
    found: dict[str, Any] = results.record["searches"]
    if not args.report:
        for cell, outcome in outcomes(
            search, lambda: [c for c in cells if f"{c.search} {c.seed}" not in found], args.workers
        ):
            found[f"{cell.search} {cell.seed}"] = outcome
            results.record |= {"run_steps": args.steps, "trials": args.trials}
            results.stamp()
            results.save()
            print(f"{cell.search} {cell.seed}: tune {best_of(outcome):.4f}, report f1 {outcome['report']['f1']:.4f}, "
                  f"{outcome['steps']} steps", file=sys.stderr, flush=True)  # fmt: skip
    print(table(found))
    save(figure(found), args.output.with_name("sweep"))


def best_of(outcome: dict[str, Any]) -> float:
    """The highest value of a trial on the tune split, fresh seeds apart."""
    return max(trial["value"] for trial in outcome["trials"] if trial["value"] is not None and not trial.get("again"))


def course(outcome: dict[str, Any]) -> tuple[list[int], list[float]]:
    """(steps spent, best value so far) after each trial that has one, fresh seeds apart."""
    spent, best, steps, values = 0, 0.0, [], []
    for trial in outcome["trials"]:
        spent += trial["steps"]
        if trial["value"] is not None and not trial.get("again"):
            best = max(best, trial["value"])
            steps.append(spent)
            values.append(best)
    return steps, values


def steps_until(outcome: dict[str, Any], value: float) -> int | None:
    """The steps spent when a value was first reached."""
    return next((step for step, best in zip(*course(outcome), strict=True) if best >= value), None)


def table(found: dict[str, Any]) -> str:
    """Each search, by seed and in the mean: steps, tune and report scores, and when the grid's best was reached."""
    header = (
        "search", "seed", "trials", "of which stopped", "steps", "best on tune", "winner on report, F1",
        "winner on report, loss", "grid's best reached after",
    )  # fmt: skip
    rows = []
    for name in SEARCHES:
        own = {int(key.split()[1]): one for key, one in found.items() if key.split()[0] == name}
        for seed, one in sorted(own.items()):
            grid = found.get(f"grid {seed}")
            until = None if grid is None else steps_until(one, best_of(grid))
            share = "" if until is None or grid is None else f" ({until / grid['steps']:.2f} of the grid's)"
            trials = [trial for trial in one["trials"] if not trial.get("again")]
            rows.append([
                name, str(seed), str(len(trials)), str(sum(trial["value"] is None for trial in trials)),
                f"{one['steps']:,}", f"{best_of(one):.4f}", *(f"{one['report'][key]:.4f}" for key in ("f1", "loss")),
                "never" if until is None else f"{until:,} steps{share}",
            ])  # fmt: skip
        if own:
            means = [
                statistics.fmean(values) for values in (
                    [one["steps"] for one in own.values()], [best_of(one) for one in own.values()],
                    [one["report"]["f1"] for one in own.values()], [one["report"]["loss"] for one in own.values()],
                )
            ]  # fmt: skip
            rows.append([f"**{name}**", "mean", "", "", f"{means[0]:,.0f}", *(f"**{m:.4f}**" for m in means[1:]), ""])
    return markdown(header, rows)


def figure(found: dict[str, Any]) -> Figure:
    """The best value so far against the steps spent: a line for every search and seed."""
    drawing = Figure(figsize=(6.4, 3.4), layout="constrained")
    ax = drawing.add_subplot()
    for name, color in SEARCHES.items():
        for index, key in enumerate(sorted(key for key in found if key.split()[0] == name)):
            steps, values = course(found[key])
            ax.step(steps, values, where="post", color=color, linewidth=1.4, label=name if index == 0 else None)
    reached = [course(one)[1][-1] for one in found.values()]
    ax.set_ylim(min(reached) - 0.06, max(reached) + 0.01)  # where searches differ; what is poorer is of no use
    ax.set_xlabel("training steps spent")
    ax.set_ylabel("best F1 on the tune split")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.grid(color="#dddddd", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return drawing


def overhead_text(trials: list[dict[str, float]]) -> str:
    """The table of what a trial's time goes into."""
    header = ("trial", "seconds", "training", "evaluation", "the rest", "share of the rest")
    rows = [
        [str(number), *(f"{one[name]:.2f}" for name in ("seconds", "training", "evaluation", "rest")),
         f"{one['rest'] / one['seconds']:.1%}"]
        for number, one in enumerate(trials)
    ]  # fmt: skip
    later = [one["rest"] / one["seconds"] for one in trials[1:]]
    said = f"\n\nSecond and later trials: {statistics.fmean(later):.1%} in the mean, {max(later):.1%} at most."
    return markdown(header, rows) + said
