"""What to do next: for each kind of page one or two steps, with the command as it can be copied.

Commands are made from what the record holds: the command that trained it, else the configuration that its folder
holds. A run of one's own script has neither, and gets the advice alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ..audit_record import AuditRecord
from ..trace import RankTrace, SweepRecord
from .audited import audit_of
from .compare import Comparison
from .facts import Subject
from .side import Side
from .sweeps import to_come
from .verdict import verdict
from .wording import Outcome, count

_AT_THE_END = "under Provenance"
_UNITS = ("ranks", "params", "bytes", "fraction")


@dataclass(frozen=True)
class Step:
    """Something to do. ``command`` is empty where the records name none; ``lacking`` says what takes the place of a
    file that the command names, for a reader who has the page alone."""

    advice: str
    command: str = ""
    lacking: str = ""


def steps_of(page: Subject) -> list[Step]:
    """What follows from a page of any kind."""
    if page.comparison is not None:
        return after_comparison(page.comparison)
    if page.sweep is not None:
        return after_sweep(page.sweep)
    if "audit" in page.parts:
        return after_audit(audit_of(page.parts))
    return [] if page.run is None else after_run(page.run.trace)


def after_run(trace: RankTrace) -> list[Step]:
    """A run says nothing about adaptive ranks; an audit with its configuration does."""
    if trace.rank_choice != "adaptive" or not trace.finished:
        return []
    words = _training(trace.command, trace.config)
    if not words:
        return []
    return [Step(
        "Find out whether adaptive ranks help: an audit tunes them and uniform LoRA alike, and compares the two over "
        "several seeds.", _audit(words, _folder(trace.config, trace.name)), _lacking(words[2], _AT_THE_END),
    )]  # fmt: skip


def after_sweep(sweep: SweepRecord) -> list[Step]:
    """Go on, look at what failed, or use the best adapter, and find out with more seeds whether its ranks helped."""
    folder = _folder(sweep.config, sweep.name)
    if to_come(sweep) and any(trial.state in ("complete", "running", "waiting") for trial in sweep.trials):
        storage = "" if sweep.storage in ("", "study.db") else ", with the --storage that it had"
        return [Step(f"Go on: the same command finishes the trials that are left{storage}.", _again(sweep, folder))]
    if sweep.best is None and any(trial.state == "complete" for trial in sweep.trials):
        return [Step("Every trial is beyond a limit: allow more (sweep.limits), or search smaller budgets and ranks.")]
    if sweep.best is None:
        return [Step(
            "Read under Trials why they failed; a single run of the same configuration shows more.",
            _line("rankalloc", "train", f"{folder}/config.yaml", "--output", f"{folder}-alone"),
            _lacking(f"{folder}/config.yaml", _AT_THE_END),
        )]  # fmt: skip
    outcome: Outcome = verdict(None, sweep).outcome
    where, whose = f"{folder}/best/adapter", "best trial"
    if outcome == "hurt" and sweep.pair is not None:
        trace = sweep.trial(sweep.pair.uniform).trace or f"trials/{sweep.pair.uniform:04d}/trace.json"
        where, whose = f"{folder}/{PurePosixPath(trace).parent}/adapter", "uniform trial"
    steps = [Step(
        f"Use the {whose}'s adapter, {where}, with PEFT; this tells which other tools read it right.",
        _line("rankalloc", "check", where), f"The sweep wrote {where}; a page alone does not hold it.",
    )]  # fmt: skip
    best = next((trial for trial in sweep.trials if trial.number == sweep.best), None)
    if best is not None and any(sweep.rank_choice(trial) == "adaptive" for trial in sweep.trials):
        own = sweep.rank_choice(best) == "adaptive"
        name = "best.yaml" if own else "config.yaml"
        steps.append(Step(
            "Find out whether adaptive ranks help: an audit tries as many learning rates on either side, and compares "
            "them over several seeds.",
            _audit(["rankalloc", "train", f"{folder}/{name}"], folder),
            _lacking(f"{folder}/{name}", f"{_AT_THE_END}, of the {'best trial' if own else 'sweep'}"),
        ))  # fmt: skip
    return steps


def after_audit(record: AuditRecord) -> list[Step]:
    """The audit's own advice; while it has none, to go on."""
    if record.advice is None:
        return [] if record.finished or not record.command else [Step("Go on with the audit.", record.command)]
    command = record.command_next or ""
    words = shlex.split(command) if command else []
    named = next((word for word in words[2:3] if word.endswith((".yaml", ".yml"))), "")
    return [Step(record.advice, command, _lacking(named, "under How it was made"))]


def after_comparison(pair: Comparison) -> list[Step]:
    """What would make the comparison fair, or surer."""
    sides = (pair.one, pair.other)
    words = [_training(side.command, side.config) for side in sides]
    if any(side.seeds is not None for side in sides):
        return _beside_an_audit(pair, words)
    if not any(one is not None and other is not None for _, _, one, other in pair.quality):
        return [_measured(sides)]
    if not pair.equal_size:
        return _at_one_size(pair, words)
    if pair.one.fingerprint != pair.other.fingerprint:
        return [Step("Train both on the same data (task, data and the splits' shares), so that they can be paired.")]
    for side, found in zip(sides, words, strict=True):
        if side.choice == "adaptive" and found and {one.choice for one in sides} != {"adaptive"}:
            return [Step(
                "One seed each shows little: an audit tunes both kinds of ranks alike, and compares them over several.",
                _audit(found, _folder(side.config, side.name)),
            )]  # fmt: skip
    return _another_seed(pair, words)


def _beside_an_audit(pair: Comparison, words: list[list[str]]) -> list[Step]:
    """An audit judges its own arms; a run beside it shares none of its seeds."""
    advice = "An audit compares its arms over paired seeds, on its own page; nothing beside it here shares those seeds"
    for side, found in zip((pair.one, pair.other), words, strict=True):
        if side.seeds is None and side.choice == "adaptive" and found:
            return [Step(f"{advice}. This judges the run in the same way.", _audit(found, _folder(side.config, "run")))]
    return [Step(f"{advice}.")]


def _measured(sides: tuple[Side, Side]) -> Step:
    """How the quality of two adapters is measured, by the run that one of them comes from where there is one."""
    run = next((side for side in sides if side.trace is not None and "name" in side.config), None)
    folder = "ADAPTER" if run is None else _folder(run.config, run.name)
    task = "CONFIG" if run is None else f"{folder}/config.yaml"
    return Step(
        "Measure what the sizes are worth: this evaluates an adapter on your data, as it is and cut to smaller sizes.",
        _line("rankalloc", "frontier", folder, "--task", task, "-o", "OUT" if run is None else f"{folder}-frontier"),
    )


def _at_one_size(pair: Comparison, words: list[list[str]]) -> list[Step]:
    """The larger one trained again with the parameters of the smaller."""
    ordered = sorted(zip((pair.one, pair.other), pair.names, words, strict=True), key=lambda one: one[0].params)
    (small, _, _), (large, name, found) = ordered
    advice = f"Compare at one size: train {name} again with the {count(small.params)} parameters of the other"
    if not found or not small.params:
        return [Step(f"{advice}.")]
    budget = large.config.get("budget")
    given = budget if isinstance(budget, Mapping) else {}
    sets = [f"budget.{unit}=null" for unit in _UNITS if given.get(unit) is not None and unit != "params"]
    output = f"{_folder(large.config, large.name)}-{small.params}"
    return [Step(f"{advice}, and report on the two.", _trained(found, output, *sets, f"budget.params={small.params}"))]


def _another_seed(pair: Comparison, words: list[list[str]]) -> list[Step]:
    advice = "One training seed each shows little: train both with another seed, and see whether the answer stays"
    if not all(words):
        return [Step(f"{advice}.")]
    sides = (pair.one, pair.other)
    seed = 1 + max([int(side.config.get("seed") or 0) for side in sides])
    outputs = [f"{_folder(side.config, side.name)}-seed-{seed}" for side in sides]
    if outputs[0] == outputs[1]:
        outputs = [f"{output}-{place}" for place, output in enumerate(outputs, 1)]
    lines = [_trained(found, output, f"seed={seed}") for found, output in zip(words, outputs, strict=True)]
    return [Step(f"{advice}.", "\n".join([*lines, _line("rankalloc", "report", outputs[0], "--compare", outputs[1])]))]


def _training(command: str | None, config: Mapping[str, Any]) -> list[str]:
    """The words that train a run, without where it writes to; [] where neither command nor folder is known."""
    try:
        words = shlex.split(command or "")
    except ValueError:
        words = []
    if words[:2] == ["rankalloc", "train"]:
        kept, output, skip = [], "", False
        for word in words:
            output = word if skip else output
            if not skip and word not in ("--output", "-o", "--resume", "--overwrite", "--json"):
                kept.append(word)
            skip = not skip and word in ("--output", "-o")
        if len(kept) > 2 and not kept[2].startswith("-"):
            return kept
        # all of its settings were given on the command line: its folder has them in a file
        folder = output or ("name" in config and _folder(config, ""))
        return ["rankalloc", "train", f"{folder}/config.yaml"] if folder else []
    if "name" not in config:
        return []
    return ["rankalloc", "train", f"{_folder(config, '')}/config.yaml"]


def _folder(config: Mapping[str, Any], name: str) -> str:
    """Where the run or sweep of a configuration writes to."""
    return str(config.get("output") or f"runs/{config.get('name') or name}").rstrip("/")


def _trained(words: list[str], output: str, *sets: str) -> str:
    return _line(*words, *(word for one in sets for word in ("--set", one)), "--output", output)


def _audit(words: list[str], folder: str) -> str:
    return _line(words[0], "audit", *words[2:], "--output", f"{folder}-audit")


def _again(sweep: SweepRecord, folder: str) -> str:
    """The command of a sweep, with the folder that it is in."""
    if not sweep.command:
        return ""
    there = "" if "--output" in sweep.command else f" --output {_quoted(folder)}"
    return sweep.command + (there if sweep.config.get("output") else "")


def _lacking(file: str, where: str) -> str:
    """What a reader does who has the page, and not the file that a command reads."""
    if not file:
        return ""
    return (
        f"It reads {file}. With this page alone, save the resolved configuration ({where}) under that name, and set "
        "the paths of your data in it."
    )


def _line(*words: str) -> str:
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    """As shlex, but a home folder's ``~`` stays one."""
    return "~/" + shlex.quote(word[2:]) if word.startswith("~/") else shlex.quote(word)
