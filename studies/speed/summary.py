"""The table in Markdown and the figure, from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..common.figures import BLUE, save
from ..common.table import markdown

TARGETS = {
    "adapter / frozen floor": 1.12, "default method / frozen floor": 1.15, "default method / PEFT LoRA": 0.9,
    "default method / PEFT AdaLoRA": 0.72,
}
RUN_TARGETS = {"default method / PEFT LoRA": 0.88, "default method / PEFT AdaLoRA": 0.68}


def table(record: dict[str, Any]) -> str:
    """Every number, with its goal where there is one."""
    rows: list[tuple[str, str, str]] = []

    def add(what: str, value: dict[str, float], goal: float | None = None) -> None:
        shown = f"{value['ratio']:.3f} ({value['low']:.3f}–{value['high']:.3f})"
        rows.append((what, shown, "" if goal is None else f"{goal:g}"))

    for part, name in (("steps", "MiniLM-L6's shape"), ("decoder", "SmolLM2's layers")):
        for said, measured in _settings(record, part):
            for what, value in measured["ratios"].items():
                add(f"step, {name}{said}: {what}", value, TARGETS.get(what) if part + said == "steps" else None)
    for part, name in (("runs", "whole run"), ("runs without dropout", "whole run without dropout")):
        for said, measured in _settings(record, part):
            for what, value in measured["ratios"].items():
                add(f"{name}{said}: {what}", value, None if said else RUN_TARGETS[what])
            for kind, tune in measured["tune"].items():
                rows.append((f"{name}{said}, tune split: {kind}", f"loss {tune['loss']:.3f}, F1 {tune['f1']:.3f}", ""))
    if "freeze" in record:
        measured = record["freeze"]["measured"]
        add("step after the freeze / step of a run born at those ranks", measured["ratio"], 1.03)
        shrunk, born = (measured["bytes"][k] for k in ("shrunk", "born"))
        for what in ("adapter", "optimizer"):
            rows.append((f"{what} bytes of the two", f"{shrunk[what]:,}, {born[what]:,}", "equal"))
    if "operators" in record:
        for kind, points in record["operators"]["measured"].items():
            counts = ", ".join(f"{p['operators']} ({p['modules']} modules)" for p in points)
            rows.append((f"operators a step for scoring and masking: {kind}", counts, ""))
    if "memory" in record:
        for kind, value in record["memory"]["measured"].items():
            kib = value["peak_kib"]
            peak = "peak not reported" if kib is None else f"peak {kib / 1024:.0f} MiB"
            if value["sizes"]:
                first, last = ((s["adapter"] + s["gradient"] + s["optimizer"] + s["allocator"]) / 2**20
                               for s in value["sizes"])
                share = value["sizes"][0]["allocator"] / value["sizes"][0]["adapter"]
                peak += f"; trained state {first:.2f} → {last:.2f} MiB; allocator {share:.3f} × adapter"
            rows.append((f"memory: {kind}", peak, ""))
    if "allocation" in record:
        goals = {"70B": "10", "a million triplets": "5"}
        for name, value in record["allocation"]["measured"].items():
            shown = f"{value['ratio']:.1f} × torch.sort ({1000 * value['seconds']:.1f} ms, {value['triplets']:,})"
            rows.append((f"one allocation: {name}", shown, goals.get(name, "")))
    for said, measured in _settings(record, "growth"):
        for point in measured:
            shown = ", ".join(f"{what} {value['ratio']:.2f}" for what, value in point["ratios"].items())
            rows.append((f"growth{said}: {point['what']} {point['value']}", shown, ""))
    return markdown(("what", "ratio: median (quartiles), or value", "at most"), rows)


def _settings(record: dict[str, Any], part: str) -> Iterator[tuple[str, Any]]:
    """Yield (the setting in words, what was measured) for each setting in which ``part`` was measured."""
    for key, value in record.items():
        if key == part or key.startswith(f"{part}, "):
            yield key.removeprefix(part).replace(", python", ", no kernel"), value["measured"]


def figure(record: dict[str, Any], stem: Path) -> None:
    """Step times over the floor, and how they grow with layers, width and rank."""
    if "steps" not in record:
        return
    grown = "growth" in record
    fig = Figure(figsize=(9, 5.2 if grown else 2.6), layout="constrained")
    top, *below = fig.subfigures(2, 1) if grown else [fig]
    axes = top.subplots()
    seconds = record["steps"]["measured"]["seconds"]
    floor = seconds["frozen floor"]
    for y, (kind, times) in enumerate(reversed(seconds.items())):
        ratios = [a / b for a, b in zip(times, floor, strict=True)]
        middle = statistics.median(ratios)
        ours = "PEFT" not in kind and kind != "frozen floor"
        axes.barh(y, middle, color=BLUE if ours else "0.75", height=0.62)
        axes.plot(ratios, [y] * len(ratios), "|", color="0.2", markersize=7)
        axes.text(0.02, y, f"{kind}: {middle:.2f}", va="center", color="white" if ours else "black", fontsize=8)
    axes.set(yticks=[], xlabel="one training step, × the frozen floor (bars: median; ticks: rounds)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    if grown:
        panels = below[0].subplots(1, 3, sharey=True)
        for panel, what in zip(panels, ("layers", "width", "rank"), strict=True):
            points = [p for p in record["growth"]["measured"] if p["what"] == what]
            for kind, colour, mark in (("PEFT LoRA", "0.45", "s--"), ("default method", BLUE, "o-")):
                ys = [p["ratios"][f"{kind} / frozen floor"]["ratio"] for p in points]
                panel.plot([p["value"] for p in points], ys, mark, color=colour, label=kind)
            panel.set_xscale("log", base=2)
            panel.set(xlabel=what, xticks=[p["value"] for p in points], xticklabels=[p["value"] for p in points])
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("step, × floor")
        panels[0].legend(frameon=False, fontsize=8)
    save(fig, stem)
