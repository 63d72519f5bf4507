"""From what was measured to the tables of both parts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from ..common.paired import Runs, difference, edge_note, judged, paired, rate_table, t_interval
from ..common.part import Part
from ..common.table import interval, markdown
from .domains import DOMAINS
from .routing import ROUTERS, SHARES

Measured = Mapping[str, Mapping[str, Any]]


def seeds_of(measured: Measured) -> list[int]:
    """The seeds whose every arm has been measured."""
    found = sorted({int(name.rpartition(" ")[2]) for name in measured})
    arms = ["average", "constant", "compose", "random router"]
    return [
        seed for seed in found
        if all(f"{arm}, {share:g} of the parameters, seed {seed}" in measured for arm in arms for share in SHARES)
        and all(_tried(measured, f"{arm} at", _place(share, seed)) for arm in ROUTERS for share in SHARES)
    ]  # fmt: skip


def arms_of(measured: Measured, share: float, seed: int) -> dict[str, Mapping[str, Any]]:
    """{arm: its run}, each at the rate with the lowest tune loss: of its own domain for an adapter alone, else of both.

    "oracle" gives every input to the adapter of its domain, so it has no run of its own.
    """
    place = _place(share, seed)
    alone = {name: _best(measured, f"{name} at", f"seed {seed}", [name]) for name in DOMAINS}
    oracle = {
        split: {key: {name: alone[name][split][key][name] for name in DOMAINS} for key in ("loss", "f1")}
        for split in ("tune", "report")
    }  # fmt: skip
    found: dict[str, Mapping[str, Any]] = {f"{name} alone": run for name, run in alone.items()}
    found |= {arm: measured[f"{arm}, {place}"] for arm in ("average", "constant", "compose", "random router")}
    found |= {arm: _best(measured, f"{arm} at", place, DOMAINS) for arm in ROUTERS}
    found["joint"] = _best(measured, "joint at", f"seed {seed}", DOMAINS)
    return {**found, "oracle": {**oracle, "params": sum(run["params"] for run in alone.values())}}


def routing_table(measured: Measured, share: float) -> str:
    """Every arm within one budget: losses by domain, and the share of the gap between the average and the oracle that
    it closes, with a t interval over seeds."""
    every = [arms_of(measured, share, seed) for seed in seeds_of(measured)]
    header = (
        "arm", "parameters", *(f"loss, {name}" for name in DOMAINS), "mean loss", "mean F1", "gap closed (95 %)",
        "own adapter's gate",
    )  # fmt: skip
    rows = []
    for arm in every[0] if every else ():
        runs = [arms[arm] for arms in every]
        losses = {name: statistics.fmean(run["report"]["loss"][name] for run in runs) for name in DOMAINS}
        closed = [gap_closed(arms, arm) for arms in every]
        gates = [statistics.fmean(run["gates"].values()) for run in runs if "gates" in run]
        rows.append([
            arm, f"{runs[0]['params']:,}", *(f"{losses[name]:.4f}" for name in DOMAINS),
            f"{statistics.fmean(losses.values()):.4f}",
            f"{statistics.fmean(statistics.fmean(run['report']['f1'].values()) for run in runs):.4f}",
            _share(closed), f"{statistics.fmean(gates):.2f}" if gates else "–",
        ])  # fmt: skip
    return markdown(header, rows)


def bottleneck_tables(part: Part, runs: Runs) -> str:
    """The rates of every arm, and each at its own beside uniform LoRA."""
    header = ("arm", "rate", "seeds", "parameters", "loss", "loss − uniform's (95 %)", "F1", "F1 − uniform's (95 %)")
    rows = []
    for arm in part.arms:
        own = [run for run in judged(part, runs, part.places[0], arm).values() if "message" not in run]
        if not own:
            continue
        pairs = [
            paired(part, runs, part.places[0], arm, "uniform", value) for value in (None, lambda run: run["f1"])
        ]  # fmt: skip
        rows.append([
            arm, f"{own[0]['rate']:g}{edge_note(part, runs, arm)}", str(len(own)), f"{own[0]['params']:,}",
            f"{statistics.fmean(run['loss'] for run in own):.4f}", difference(pairs[0]),
            f"{statistics.fmean(run['f1'] for run in own):.4f}", difference(pairs[1]),
        ])  # fmt: skip
    return f"{rate_table(part, runs)}\n\n{markdown(header, rows)}"


def _place(share: float, seed: int) -> str:
    return f"{share:g} of the parameters, seed {seed}"


def _tried(measured: Measured, begins: str, ends: str) -> list[str]:
    return [name for name in measured if name.startswith(f"{begins} ") and name.endswith(f", {ends}")]


def _best(measured: Measured, begins: str, ends: str, domains: tuple[str, ...] | list[str]) -> Mapping[str, Any]:
    tried = _tried(measured, begins, ends)
    return measured[min(tried, key=lambda name: sum(measured[name]["tune"]["loss"][one] for one in domains))]


def gap_closed(arms: Mapping[str, Mapping[str, Any]], arm: str) -> float:
    """0 for the average of the adapters, 1 for the oracle."""
    mean = {name: statistics.fmean(arms[name]["report"]["loss"].values()) for name in ("average", "oracle", arm)}
    return (mean["average"] - mean[arm]) / (mean["average"] - mean["oracle"])


def _share(values: list[float]) -> str:
    if len(values) < 2 or len(set(values)) == 1:
        return f"{statistics.fmean(values):+.2f}"
    mean, low, high = t_interval(values)
    return f"{mean:+.2f} ({interval(low, high)})"
