"""How often is an audit wrong, and how often does it find what is there? See README.md in this folder.

    python -m studies.audit_rates [--audits 10000] [--report] [--quick]

Every scenario that has finished with as many audits is in results.json and is not repeated. ``--report`` only prints
and draws.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rankalloc.experiments.audits.judgements import BETTER, EQUIVALENT, WORSE, Design

from ..common.arguments import QUICK, at_least_one, parse, study_parser
from ..common.figures import BLUE, GREY, ORANGE, save
from ..common.results import Results
from ..common.table import markdown
from .simulation import OPEN, SCENARIOS, coverage, found_by, primary_alone, rates

HERE = Path(__file__).parent
DIFFERENCES = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)
CURVES = {"planned": (Design(), (4, 6, 8)), "open-ended": (OPEN, (8, 12))}


def main(argv: Sequence[str] | None = None) -> None:
    parser = study_parser(HERE, __doc__, workers=False)
    parser.add_argument("--audits", type=at_least_one, default=10000, help="of every scenario (10000)")
    args = parse(parser, argv, audits=100, output=QUICK / "audit_rates" / "results.json")
    results = Results(args.output, 1, scenarios={}, curves={}, coverage={}, primary={})
    if not args.report:
        simulate(results, args.audits)
    print(table(results.record["scenarios"]))
    alone = ", ".join(f"{name} {share:.2%}" for name, share in results.record["primary"].items() if name != "audits")
    print(f"\nThe primary comparison in {results.record['primary']['audits']:,} audits: {alone}")
    held = ", ".join(f"{name} {share:.1%}" for name, share in results.record["coverage"].items() if name != "audits")
    print(f"\n95 % intervals that hold the truth, over new seeds and examples: {held}")
    save(figure(results.record), args.output.with_name("audit_rates"))


def simulate(results: Results, audits: int) -> None:
    """Run what is missing. Every part has its own seed, so that the order does not matter."""
    record = results.record

    def keep() -> None:
        results.stamp()
        results.save()

    for number, (name, scenario) in enumerate(SCENARIOS.items()):
        wanted = min(audits, 2000) if scenario.design.open_ended else audits  # each look judges all looks before it
        if record["scenarios"].get(name, {}).get("audits") != wanted:
            record["scenarios"][name] = rates(scenario, wanted, number)
            print(f"{name}: {record['scenarios'][name]['wrong']}", file=sys.stderr, flush=True)
            keep()
    if record["curves"].get("audits") != audits // 5:
        record["curves"] = {"audits": audits // 5, "differences": DIFFERENCES} | {
            name: [found_by(d, design, seeds, audits // 5, 100) for d in DIFFERENCES]
            for name, (design, seeds) in CURVES.items()
        }
        keep()
    if record["coverage"].get("audits") != audits:
        record["coverage"] = {"audits": audits, **coverage(audits, 200)}
        keep()
    if record["primary"].get("audits") != 100 * audits:
        record["primary"] = {"audits": 100 * audits, **primary_alone(100 * audits, 300)}
        keep()


def table(scenarios: dict[str, Any]) -> str:
    """One line for each scenario: wrong claims of any comparison, and what was claimed of the primary one."""
    header = (
        "true differences", "wrong: a difference", "wrong: equivalence", "wrong: either", "primary better",
        "primary worse", "primary equivalent", "others better or worse", "seeds", "limits missed (low, high)",
    )  # fmt: skip
    rows = []
    for name, one in ((name, scenarios[name]) for name in SCENARIOS if name in scenarios):
        several = len(one["truth"]) > 1
        rows.append([
            name, *(f"{one['wrong'][kind]:.1%}" for kind in ("difference", "equivalence", "either")),
            *(f"{one['primary'].get(claim, 0):.1%}" for claim in (BETTER, WORSE, EQUIVALENT)),
            f"{one['others_differ']:.1%}" if several else "–", f"{one['seeds']:.1f}",
            ", ".join(f"{share:.1%}" for share in one["limits_missed"]),
        ])  # fmt: skip
    return markdown(header, rows)


def figure(record: dict[str, Any]) -> Figure:
    """Left: wrong claims in every scenario. Right: how often a true difference is found, by seeds."""
    drawing = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = drawing.subplots(1, 2, width_ratios=(3, 2))
    names = [name for name in SCENARIOS if name in record["scenarios"]]
    for kind, color, shift in (("difference", BLUE, -0.15), ("equivalence", ORANGE, 0.15)):
        shares = [100 * record["scenarios"][name]["wrong"][kind] for name in names]
        left.plot(shares, [i + shift for i in range(len(names))], "o", color=color, markersize=5, label=kind)
    left.axvline(5, color="#222222", linewidth=0.9)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set_xlim(-0.2, 8)
    left.set_xlabel("audits with a wrong claim, %")
    left.legend(frameon=False, fontsize=8, loc="center right")
    curves = record["curves"]
    for name, color, style in (("planned", BLUE, "-"), ("open-ended", GREY, "--")):
        for i, seeds in enumerate(CURVES[name][1]):
            shares = [100 * row[i] for row in curves[name]]
            right.plot(curves["differences"], shares, style, color=color, linewidth=1 + 0.4 * i)
            right.annotate(f"{seeds}", (curves["differences"][6], shares[6]), fontsize=8, color=color, xytext=(5, -10),
                           textcoords="offset points")  # fmt: skip
        right.plot([], [], style, color=color, label=name)
    right.axhline(80, color="#222222", linewidth=0.9)
    right.set_xlabel("true difference, sd")
    right.set_ylabel("audits that claim better, %")
    right.set_ylim(-6, 125)
    right.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    for ax in (left, right):
        ax.grid(color="#dddddd", linewidth=0.5)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return drawing
