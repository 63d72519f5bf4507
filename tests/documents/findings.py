"""What the committed JSON files say, through the studies' own analyses; every file is read once."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rankalloc as ra
from studies.chat.analysis import advantage, finished
from studies.chat.arms import ATTACH as CHAT_ATTACH
from studies.chat.parts import PARTS as CHAT
from studies.common.paired import judged, paired
from studies.common.part import Part
from studies.default.analysis import Comparison, compare
from studies.doors.analysis import paired as beside_attach
from studies.doors.arms import ATTACH, DRIVEN
from studies.doors.parts import PARTS as DOORS
from studies.dylora import analysis as dylora
from studies.mix.analysis import arms_of, gap_closed, seeds_of
from studies.mix.bottleneck import PART as BOTTLENECK
from studies.planted import summary as planted
from studies.sweep.run import best_of, steps_until
from studies.variants import analysis as variants
from studies.variants.arms import ARMS as VARIANTS

ROOT = Path(__file__).parents[2]


@functools.cache
def read(path: str) -> Any:
    """A committed JSON file, by its path from the root."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def steps_of(study: str) -> int:
    """The number of steps that all runs of a study have."""
    (steps,) = {run["steps"] for run in read(f"studies/{study}/results.json")["runs"]}
    return steps


# tight: auto beside other ways to spend a small budget

HAND = ("attention", "MLP-in", "MLP-out", "mixed")
TASKS = ("punctuation", "pos")


@functools.cache
def tight(arm: str | tuple[str, ...], size: str | None = None) -> list[dict[str, Any]]:
    """The rows of an arm, or of those whose names begin so, by task and size."""
    rows = [row for row in read("studies/tight/rows.json") if row["arm"].startswith(arm)]
    return [row for task in TASKS for row in rows if row["task"] == task and size in (None, row["size"])]


def by(rows: Iterable[dict[str, Any]], *keys: str) -> list[float]:
    """The values of the keys, row by row."""
    return [row[key] for row in rows for key in keys]


def all_above_zero(rows: Iterable[dict[str, Any]]) -> bool:
    return all(row["low"] > 0 for row in rows)


# frontier: one run beside uniform LoRA tuned at every budget


@functools.cache
def frontier(line: str) -> dict[str, Any]:
    """A line's area on punctuation, and {rank: its row} as "budgets"."""
    found = read("studies/frontier/rows.json")
    (area,) = [area for area in found["areas"] if area["line"] == line]
    return {**area, "budgets": {row["rank"]: row for row in found["budgets"] if row["line"] == line}}


# default, audits

@functools.cache
def default(arm: str, against: str = "uniform", measure: str = "loss") -> dict[str, Comparison]:
    """{task: an arm beside another}, at one rank a layer."""
    found = compare(read("studies/default/results.json")["runs"], measure, rate_seeds=1)
    return {c.task: c for c in found if (c.arm, c.against, c.budget) == (arm, against, 1)}


@functools.cache
def audit(name: str) -> ra.AuditRecord:
    return ra.AuditRecord.load(ROOT / f"studies/audits/{name}.json")


def points(name: str, arm: str) -> list[float]:
    """(mean, low, high) of what auto gains over an arm, in points."""
    one = audit(name).comparison(arm)
    assert one and one.low is not None and one.high is not None
    return [100 * one.mean, 100 * one.low, 100 * one.high]


def no_gain_is_shown(name: str) -> bool:
    one = audit(name).comparison("uniform")
    return one is not None and one.claim == "undecided"


def is_stable(name: str) -> bool:
    """Whether two seeds choose ranks more alike than two draws by chance."""
    own = [row for row in read("studies/audits/stability.json")["seeds"] if row["audit"] == f"audit-{name}"]
    rows = {row["arm"]: row for row in own}
    return all(rows["auto"][what] > rows["random"][what] + 0.2 for what in ("spearman", "jaccard"))


# chat, doors, mix: parts of common.part


@functools.cache
def runs_of(study: str, part: Part) -> list[dict[str, Any]]:
    return part.own(read(f"studies/{study}/results.json")["runs"])


@functools.cache
def chat(budget: str, arm: str) -> tuple[float, float, float]:
    """(mean, low, high) of what auto is behind tuned equal ranks, in nats."""
    found = advantage(CHAT[budget], runs_of("chat", CHAT[budget]), arm)
    assert found is not None
    return found[:3]


def chat_seeds() -> float:
    return len(finished(CHAT["half"], runs_of("chat", CHAT["half"]), CHAT_ATTACH))


def doors(part: str, place: str | None = None, value: Any = None, arm: str = DRIVEN) -> tuple[float, float, float]:
    """(mean, low, high) of an arm minus attach; of planted ranks the logarithm of the error."""
    found = beside_attach(DOORS[part], runs_of("doors", DOORS[part]), place or part, arm, value)
    assert found is not None
    return found[:3]


def door_runs(part: str, arm: str, place: str | None = None) -> list[dict[str, Any]]:
    return list(judged(DOORS[part], runs_of("doors", DOORS[part]), place or part, arm).values())


def tried(part: str, arm: str, rate: float) -> list[dict[str, Any]]:
    """The runs that tried a rate of an arm on the tune split."""
    runs = runs_of("doors", DOORS[part])
    return [run for run in runs if (run["phase"], run["arm"], run["rate"]) == ("rates", arm, rate)]


def mean_of(runs: Iterable[dict[str, Any]], what: str) -> float:
    return statistics.fmean(run[what] for run in runs)


def rates_beside_attach() -> list[float]:
    """The rate of the driven arm over attach's, for each part."""
    found = []
    for part in DOORS.values():
        own, other = (part.chosen_rate(runs_of("doors", part), arm) for arm in (DRIVEN, ATTACH))
        assert own and other
        found.append(own / other)
    return found


def planted_errors() -> list[float]:
    """The error of the driven arm over attach's, for each problem."""
    return [10 ** doors("planted", place)[0] for place in DOORS["planted"].places]


def finds_every_rank(arm: str) -> bool:
    places = [place for place in DOORS["planted"].places if place.startswith("main")]
    return all(run["exact"] == 1 for place in places for run in door_runs("planted", arm, place))


def bottleneck(arm: str) -> float:
    """What bottlenecks are behind uniform LoRA, in nats."""
    found = paired(BOTTLENECK, runs_of("mix", BOTTLENECK), BOTTLENECK.places[0], arm, "uniform")
    assert found is not None
    return found[0]


def closed(*arms: str) -> float:
    """The mean share of the gap that arms close, over budgets and seeds."""
    measured = read("studies/mix/results.json")["measured"]
    every = [arms_of(measured, share, seed) for share in (1, 0.5) for seed in seeds_of(measured)]
    return statistics.fmean(gap_closed(found, arm) for found in every for arm in arms)


# planted, variants, dylora


def planted_are_found(method: str, *kinds: str) -> bool:
    """Whether a method found every rank in all runs of these variants, on both networks."""
    runs = [run for run in read("studies/planted/results.json")["runs"] if run["method"] == method]
    rows = [row for row in planted.rows({"runs": runs}) if row.tuned and row.variant in kinds]
    return len(rows) == 2 * len(kinds) and all(share == 1 for row in rows for share in row.exact)


@functools.cache
def variant_rows() -> dict[str, dict[str, Any]]:
    runs = [run for run in read("studies/variants/results.json")["runs"] if (run["rank"], run["steps"]) == (4, 96)]
    return {row["arm"]: row for row in variants.compare(runs, list(VARIANTS), 1)}


def furthest_variant() -> float:
    return max(-row["f1 advantage"]["difference"] for arm, row in variant_rows().items() if arm != "LoRA")


def is_level(arm: str) -> bool:
    advantage = variant_rows()[arm]["f1 advantage"]
    return bool(advantage["low"] <= 0 <= advantage["high"])


@functools.cache
def dylora_rows() -> list[dict[str, Any]]:
    runs = [run for run in read("studies/dylora/results.json")["runs"] if run["steps"] == 480]
    return dylora.compare(dylora.complete(runs, 4), 4)


# shrink, recover, refine, sweep


def kept(kind: str, share: float) -> tuple[float, float]:
    """(the share of the parameters, the percent of F1) that a kind of cut keeps."""
    rows = read("studies/shrink/results.json")["summary"]
    (row,) = [row for row in rows if (row["kind"], row["share"]) == (kind, share)]
    return row["params"] / rows[0]["params"], 100 * row["kept"]


def cut_to() -> float:
    """The share of the parameters that is left of the adapters of recover and refine."""
    params = read("studies/recover/results.json")[0]["params"]
    return params["cut"] / params["whole"]


def recover(arm: str) -> float:
    return statistics.fmean(run["arms"][arm]["f1"] for run in read("studies/recover/results.json"))


def refined(rule: str, beside: str, measure: str = "f1") -> float:
    """What a rule gained on the adapter that was cut to a quarter."""
    sizes = [run["sizes"]["a quarter"] for run in read("studies/refine/results.json")["runs"]]
    return statistics.fmean(size[rule][measure] - size[beside][measure] for size in sizes)


def sweep(what: str, search: str = "sweep") -> list[float]:
    """A figure of a search, by seed: its steps, its winner's F1, or the percent of the grid's steps until its best."""
    found = read("studies/sweep/results.json")["searches"]
    seeds = sorted(int(key.split()[1]) for key in found if key.startswith(f"{search} "))
    if what == "steps":
        return [found[f"{search} {seed}"]["steps"] for seed in seeds]
    if what == "f1":
        return [found[f"{search} {seed}"]["report"]["f1"] for seed in seeds]
    grids = [found[f"grid {seed}"] for seed in seeds]
    until = [steps_until(found[f"{search} {seed}"], best_of(grid)) for seed, grid in zip(seeds, grids, strict=True)]
    return [100 * (steps or float("inf")) / grid["steps"] for steps, grid in zip(until, grids, strict=True)]


# file_speed, audit_rates


def peers(arm: str, what: str) -> float:
    """A figure of shrinking or extracting, beside other tools."""
    (row,) = [row for row in read("reports/speed-peers.json")["rows"] if row["arm"] == arm]
    return row[what]


def wrong(scenario: str, what: str = "either") -> float:
    """How many percent of simulated audits made a wrong claim."""
    return 100 * read("studies/audit_rates/results.json")["scenarios"][scenario]["wrong"][what]


def simulated(what: str) -> float:
    """Percent of the simulated audits of the primary comparison."""
    return 100 * read("studies/audit_rates/results.json")["primary"][what]
