"""From finished runs to the comparison: chosen rates, paired differences to ``ra.attach``, tables.

Every interval is a t interval over paired seeds. Differences of losses are in nats, those of errors are factors: the
exponential of a mean difference of logarithms.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

from ..common import paired as common
from ..common.grid import Grid
from ..common.paired import Runs, difference, edge_note, judged, rate_table
from ..common.part import Part, value_of
from ..common.table import markdown
from .arms import ATTACH

REFERENCE = ATTACH
ONE_RATE = 1e-2
"""The rate of studies/planted, at which the arms of part "planted" are compared as well: there errors at the end are
those of the last steps' size, and so depend on the rate more than on anything else."""


def paired(
    part: Part, runs: Runs, place: str, arm: str, value: Callable[[dict], float] | None = None
) -> tuple[float, float, float, list[float]] | None:
    """An arm beside ``ra.attach``, as :func:`studies.common.paired.paired`."""
    return common.paired(part, runs, place, arm, REFERENCE, value)


def report(part: Part, runs: Runs) -> str:
    """A part's tables in Markdown."""
    if part.name == "planted":
        own, same = planted_table(part, runs), planted_table(at(ONE_RATE, part), runs)
        return "\n\n".join([planted_rates(part, runs), own, same])
    return "\n\n".join([rate_table(part, runs), loss_table(part, runs)])


def at(rate: float, part: Part) -> Part:
    """The part with one rate for all arms."""
    return replace(part, grid=Grid.fixed([rate]))


def planted_rates(part: Part, runs: Runs) -> str:
    """The error of every arm on each problem at every rate it was tried at, and the share of exact layers."""
    found = {(run["place"], run["arm"], run["rate"]): run for run in runs if run["phase"] == "rates"}
    rates = sorted({rate for _, _, rate in found})
    best = {arm: part.chosen_rate(runs, arm) for arm in part.arms}

    def cell(place: str, arm: str, rate: float) -> str:
        run = found.get((place, arm, rate))
        text = "–" if run is None else "diverged" if "message" in run else f"{run['relative_error']:.1e}"
        if run is not None and place.startswith("main") and run.get("exact", 1) < 1:
            text += f" ({run['exact']:.0%} exact)"
        return f"**{text}**" if rate == best[arm] else text

    rows = [[place, arm, *(cell(place, arm, rate) for rate in rates)] for place in part.places for arm in part.arms]
    return markdown(("problem", "arm", *(f"{rate:g}" for rate in rates)), rows)


def planted_table(part: Part, runs: Runs) -> str:
    """Ranks and errors of each arm on each problem, at the arm's own rate."""
    header = ("problem", "arm", "rate", "seeds", "layers exact", "relative error, geometric mean", "worst",
              "error ÷ attach's (95 %)", "each seed", "CPU s")  # fmt: skip
    rows = []
    for place in part.places:
        for arm in part.arms:
            if not (own := list(judged(part, runs, place, arm).values())):
                continue
            errors, ratio = [10 ** value_of(part, run) for run in own], paired(part, runs, place, arm)
            rows.append([
                place, arm, f"{own[0]['rate']:g}{edge_note(part, runs, arm)}", str(len(own)),
                "–" if place.startswith("half") else f"{statistics.fmean(run.get('exact', 0) for run in own):.1%}",
                f"{statistics.geometric_mean(errors):.1e}", f"{max(errors):.1e}",
                "–" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*(10**value for value in ratio[:3])),
                "–" if ratio is None else " ".join(f"{10**value:.2f}" for value in ratio[3]), _seconds(own),
            ])  # fmt: skip
    return markdown(header, rows)


def loss_table(part: Part, runs: Runs) -> str:
    """Each arm at its own rate, on the seeds that chose none."""
    scored = any("f1" in run for run in runs)
    header = ["arm", "rate", "seeds", "trained at the peak", "at the end", "loss", "worst", "loss − attach's (95 %)"]
    header += ["F1", "F1 − attach's (95 %)"] if scored else []
    rows = []
    for arm in part.arms:
        every = judged(part, runs, part.places[0], arm)
        own = [run for run in every.values() if "message" not in run]
        if not own:
            continue
        losses, pair = [run["loss"] for run in own], paired(part, runs, part.places[0], arm)
        lost = f" ({len(every) - len(own)} diverged)" if len(own) < len(every) else ""
        row = [
            arm, f"{own[0]['rate']:g}{edge_note(part, runs, arm)}", f"{len(own)}{lost}",
            *(f"{max(run[name] for run in own):,}" for name in ("peak_params", "final_params")),
            f"{statistics.fmean(losses):.4f}", f"{max(losses):.4f}", difference(pair),
        ]  # fmt: skip
        if scored:
            pair = paired(part, runs, part.places[0], arm, lambda run: run["f1"])
            row += [f"{statistics.fmean(run['f1'] for run in own):.4f}", difference(pair)]
        rows.append([*row, _seconds(own)])
    return markdown([*header, "CPU s"], rows)


def _seconds(runs: Runs) -> str:
    return f"{statistics.median(run['cpu_seconds'] for run in runs if 'cpu_seconds' in run):.0f}"
