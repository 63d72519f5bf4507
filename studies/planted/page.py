"""The study's page: figures with their numbers, in the style of the package's reports."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import groupby
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from rankalloc.report import colours, svg
from rankalloc.report.exhibit import Exhibit
from rankalloc.report.templating import TEMPLATES
from rankalloc.report.wording import plural, printable

from .problems import VARIANTS
from .summary import HEADER, Row, cells, exact_text, ratio_text, rows
from .training import PROTOCOL, default_method, parametrisation, rate_of

HERE = Path(__file__).parent
WORDS = {
    "main": "Equal spectra; the budget is the planted total, so the planted ranks are the one right answer.",
    "half": "Planted singular values fall by halves and the budget is half the planted total: no allocation is "
    "exact, the error is the measure. Misplaced ranks are those above the planted ones.",
    "decaying": "Planted singular values fall by halves; the budget is the planted total.",
    "correlated": "Equal spectra; inputs whose covariance has a condition number of 100.",
    "noise": "Equal spectra; the teacher's answers carry noise of a tenth of the teacher's own change.",
}
NETWORKS = {"mlp": "MLP", "transformer": "transformer"}
RIVALS = {"uniform": "uniform ranks", "adalora": "AdaLoRA"}
MAPPED = ("adalora", "uniform")


def write_page(record: dict) -> str:
    """The whole page; for the same record the same text. Names are escaped; nothing is loaded from elsewhere."""
    found = rows(record)
    runs = [r for r in record["runs"] if r["protocol"] == PROTOCOL]
    environment = Environment(
        loader=ChoiceLoader([FileSystemLoader(HERE), FileSystemLoader(TEMPLATES)]), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    environment.filters |= {"printable": printable, "svg": Markup}  # svg.inline escapes every name itself
    light, dark = colours.palette()
    sections = [
        (variant, WORDS[variant], exhibits(record, [r for r in found if r.variant == variant]))
        for variant in VARIANTS if any(r.variant == variant for r in found)
    ]
    return environment.get_template("page.html.j2").render(
        light=light, dark=dark, style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        sections=sections, header=HEADER, table=[cells(row) for row in found], findings=findings(found),
        headline=headline(found),
        failed=[r for r in record["failed"] if r["protocol"] == PROTOCOL], default=default_method(),
        environment=record.get("environment"),
        unspent=sorted({r["method"] for r in runs if r["spent"] != r["budget"]}),
        rates=sorted({(parametrisation(r.method), rate_of(r.method)) for r in found}),
    )


def findings(found: list[Row]) -> list[str]:
    """One sentence for each variant and network: how the default did, and who did better or worse."""
    lines = []
    for (variant, network), group in groupby(_shown(found), key=lambda r: (r.variant, r.architecture)):
        members = list(group)
        own = [r for r in members if r.method == default_method()]
        if not own:
            continue
        said = [f"{variant}, {NETWORKS[network]}: {own[0].method} ends with a median error of {own[0].median:.1e}"]
        if variant != "half":
            said.append(f" and {exact_text(own[0])} of layers exact")
        for words, verdict in (
            ("lower error", "higher"), ("higher error", "lower"), ("no difference shown", "within the interval")
        ):
            names = [r.method for r in members if r.verdict == verdict]
            if names:
                said.append(f"; {words}: {', '.join(names)}")
        lines.append("".join(said) + ".")
    return lines


def headline(found: list[Row]) -> str:
    """The answer in a sentence: what the default finds, whom it beats and who beats it, over all variants and networks.
    Empty while the default has no run."""
    name = default_method()
    problems = [list(group) for _, group in groupby(_shown(found), key=lambda r: (r.variant, r.architecture))]
    problems = [members for members in problems if any(r.method == name for r in members)]
    if not problems:
        return ""
    own = [r for members in problems for r in members if r.method == name and r.variant == "main"]
    text = ""
    if own:
        share = statistics.mean(one for r in own for one in r.exact)
        text = (
            f"{name} gives {share:.1%} of layers the planted rank where the spectra are equal and the budget is the "
            "planted total. "
        )
    against = [
        f"{RIVALS[rival]} in {sum(r.verdict == 'lower' for r in met)} of {len(met)}" for rival in RIVALS
        if (met := [r for members in problems for r in members if r.method == rival])
    ]
    ahead = Counter(r.method for members in problems for r in members if r.verdict == "higher")
    said = ", ".join(f"{method} in {times}" for method, times in sorted(ahead.items())) or "no method"
    beats = f" is lower than that of {' and of '.join(against)};" if against else ":"
    many = plural(len(problems), "problem")
    return f"{text}Over {many} its error{beats} a lower error than its own is shown by {said}."


def exhibits(record: dict, found: list[Row]) -> list[Exhibit]:
    """A variant's figures: for each network the errors, and the ranks of one seed."""
    shown = []
    for network, group in groupby(_shown(found), key=lambda r: r.architecture):
        members = list(group)
        key, variant = f"{members[0].variant}-{network}", members[0].variant
        other = "ranks misplaced" if variant == "half" else "layers exact"
        shown.append(Exhibit(
            f"errors-{key}", f"Error by method, {NETWORKS[network]}",
            lambda members=members: errors_figure(members),
            f"Relative error E‖student − teacher‖² / E‖base − teacher‖²: a dot for each of "
            f"{plural(max(len(r.seeds) for r in members), 'seed')}, a line at the median, lowest first; at the right, "
            f"the mean share of {other}. Blue: the default, {default_method()}; orange: controls that do not place.",
            ["method", "rate", "median", "every seed", other, "error ÷ default's [95 %]"],
            [[r.method, f"{r.rate:g}", f"{r.median:.1e}", ", ".join(f"{e:.1e}" for e in r.errors),
              f"{statistics.mean(_share(r)):.1%}", ratio_text(r)] for r in members],
        ))
        runs = _mapped(record, members)
        if runs:
            lines = [("planted", runs[0]["planted_ranks"]), *((r["method"], r["ranks"]) for r in runs)]
            layers = list(runs[0]["planted_ranks"])
            shown.append(Exhibit(
                f"map-{key}", f"Planted and found ranks, {NETWORKS[network]}, seed {runs[0]['seed']}",
                lambda lines=lines, layers=layers: map_figure(lines, layers),
                "Rank of each layer. Darker is higher (lighter in dark mode), a dashed cell is rank 0, and an orange "
                "frame marks a rank that is not the planted one.",
                ["ranks", *layers], [[name, *(str(ranks[layer]) for layer in layers)] for name, ranks in lines],
            ))
    return shown


def errors_figure(members: list[Row]) -> Figure:
    """Left: errors on a logarithmic axis, one line a method; right: a share as a bar."""
    figure = svg.canvas(0.9 + 0.26 * len(members))
    left, right = figure.subplots(1, 2, width_ratios=(4, 1), sharey=True)
    errors = [e for r in members for e in r.errors]
    svg.logarithmic(left, "x", max(min(errors), 1e-16) / 2, max(errors) * 2)
    for place, row in enumerate(members):
        colour = _colour(row.method)
        left.plot(row.errors, [place] * len(row.errors), "o", color=colour, markersize=5, alpha=0.55,
                  markeredgewidth=0)
        left.plot([row.median] * 2, [place - 0.34, place + 0.34], color=colour, linewidth=2)
        share = statistics.mean(_share(row))
        right.barh(place, share, height=0.6, color=colour)
        right.text(share + 0.03, place, f"{share:.0%}", va="center", size=8.5)
    left.set_yticks(range(len(members)), [printable(r.method) for r in members], color=colours.INK)
    left.set(ylim=(len(members) - 0.4, -0.6), xlabel="relative error")
    left.grid(axis="x")
    right.set(xlim=(0, 1.25), xlabel="ranks misplaced" if members[0].variant == "half" else "layers exact")
    right.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    left.legend(
        handles=[Line2D([], [], marker="o", linestyle="none", color=c, markersize=5, label=t) for c, t in
                 ((colours.ADAPTIVE, "default"), (colours.UNIFORM, "control"), (colours.MUTED, "other methods"))],
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1, handletextpad=0.1, columnspacing=1.2,
    )
    return figure


def map_figure(lines: list[tuple[str, dict[str, int]]], layers: list[str]) -> Figure:
    """Methods × layers, the rank in each cell; the first line is what was planted."""
    top = max(ranks[layer] for _, ranks in lines for layer in layers)
    figure = svg.canvas(1.1 + 0.36 * len(lines))
    axes = figure.add_subplot()
    for y, (_, ranks) in enumerate(lines):
        for x, layer in enumerate(layers):
            _cell(axes, x, y + (0.25 if y else 0), ranks[layer], top, ranks[layer] != lines[0][1][layer])
    axes.set(xlim=(-0.55, len(layers) - 0.45), ylim=(len(lines) - 0.1, -0.55))
    axes.set_yticks([y + (0.25 if y else 0) for y in range(len(lines))], [printable(name) for name, _ in lines],
                    color=colours.INK)
    axes.set_xticks(range(len(layers)), [printable(layer.removeprefix("blocks.")) for layer in layers],
                    rotation=45, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _cell(axes: Axes, x: float, y: float, rank: int, top: int, wrong: bool) -> None:
    step = colours.level(rank, top)
    axes.add_patch(Rectangle(
        (x - 0.44, y - 0.42), 0.88, 0.84, facecolor=colours.fill(step) if rank else "none",
        edgecolor=colours.UNIFORM if wrong else "none" if rank else colours.MUTED, linewidth=1.8 if wrong else 0.8,
        linestyle="-" if rank or wrong else (0, (2, 2)),
    ))
    axes.text(x, y, str(rank), ha="center", va="center", color=colours.text_on(step) if rank else colours.INK)


def _shown(found: list[Row]) -> list[Row]:
    """The rows that figures show: each method at the rate the study gives it, and the most common run length."""
    if not found:
        return []
    steps = statistics.mode(r.steps for r in found)
    return [r for r in found if r.tuned and r.steps == steps]


def _share(row: Row) -> tuple[float, ...]:
    return row.misplaced if row.variant == "half" else row.exact


def _colour(method: str) -> str:
    control = method == "uniform" or "/" in method
    return colours.ADAPTIVE if method == default_method() else colours.UNIFORM if control else colours.MUTED


def _mapped(record: dict, members: list[Row]) -> list[dict]:
    """The default's run at its first seed, and those of the methods shown beside it."""
    wanted = {r.method: r for r in members if r.method in (default_method(), *MAPPED)}
    own = wanted.get(default_method())
    if own is None:
        return []
    chosen = [
        r for name in (default_method(), *MAPPED) if name in wanted for r in record["runs"]
        if r["protocol"] == PROTOCOL and r["seed"] == own.seeds[0] and r["method"] == name
        and (r["variant"], r["architecture"], r["rate"], r["steps"])
        == (own.variant, own.architecture, wanted[name].rate, own.steps)
    ]
    return chosen
