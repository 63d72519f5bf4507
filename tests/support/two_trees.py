"""Two checkouts of rankalloc, the same commands, the same bytes: what a change of the code's plan must not change.

    python -m tests.support.two_trees OLD NEW --output FOLDER [--methods auto,adalora] [--steps 10]

Each tree, in a process of its own, trains every method on MiniLM and punctuation with checkpoints, sweeps, and shrinks,
composes and exports what came out. Then NEW resumes OLD's checkpoint of half the run, and the sweep that OLD left half
done. Adapters are compared byte by byte, traces and sweep records key by key but for time, versions and paths.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

LIMITS = ["data.limit_train=96", "data.limit_tune=16", "data.limit_report=16"]
VARIABLE = {"created", "command", "seconds", "wall_seconds", "step_seconds_before_freeze", "step_seconds_after_freeze",
            "environment", "storage", "output"}
OPTIONS = {"manual": ["method_options.rank_pattern={query: 4, value: 2}", "budget.fraction=null", "budget.ranks=132"],
           "module-types": ["method_options.weights={query: 2.0}"],
           "dylora": ["adapter.scale=rslora"]}
KINDS = {
    "lora-fa": ["method=first-order", "adapter.init=lora-fa"],
    "dropout": ["method=auto", "adapter.dropout=0.1"],
    "shuffled": ["method=auto", "method_options.placement=shuffled"],
    "grouped": ["method=adalora", "method_options.placement=grouped"],
    "params": ["method=auto", "budget.fraction=null", "budget.params=60000"],
}


def train(folder: Path, steps: int, sets: list[str], resume: bool = False) -> list[str]:
    half = steps // 2
    common = [f"training.steps={steps}", f"training.save_every={half}", "training.batch_size=8", "adapter.rank=4",
              "seed=3", *LIMITS]
    if not any(s.startswith("budget.") for s in sets):
        common.append("budget.fraction=0.5")
    arguments = ["train", "--output", str(folder)]
    for setting in [*common, *sets]:
        arguments += ["--set", setting]
    return [*arguments, *(["--resume"] if resume else [])]


def sweep(folder: Path, trials: int) -> list[str]:
    config = folder.parent / "sweep.yaml"
    config.write_text("name: two-trees\n", encoding="utf-8")
    arguments = ["sweep", str(config), "--trials", str(trials), "--output", str(folder)]
    for setting in ["training.steps=4", "training.batch_size=8", "adapter.rank=4", "seed=3", *LIMITS,
                    "sweep.search.rank=[2, 4]"]:
        arguments += ["--set", setting]
    return arguments


def run_commands(tree: Path, commands: list[list[str]], log: Path) -> None:
    """Run commands one after another in one process of that tree."""
    code = (
        "import json, sys\n"
        "from rankalloc.cli import app\n"
        "import rankalloc; assert rankalloc.__file__.startswith(sys.argv[1]), rankalloc.__file__\n"
        "for command in json.load(sys.stdin):\n"
        "    print('::', *command, flush=True)\n"
        "    try: code = app(command, standalone_mode=False)\n"
        "    except SystemExit as end: code = end.code\n"
        "    if code: sys.exit(f'ended with {code}: {command}')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w") as output:
        subprocess.run([sys.executable, "-c", code, str(tree)], input=json.dumps(commands), text=True, check=True,
                       env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=tree)


def commands_of(folder: Path, methods: list[str], steps: int) -> list[list[str]]:
    commands = [train(folder / "runs" / m, steps, [f"method={m}", *OPTIONS.get(m, [])]) for m in methods]
    commands += [train(folder / "runs" / kind, steps, sets) for kind, sets in KINDS.items()]
    a, b = folder / "runs" / "auto" / "adapter", folder / "runs" / "uniform" / "adapter"
    commands += [
        ["shrink", str(a), "--fraction", "0.5", "-o", str(folder / "posthoc" / "small")],
        ["shrink", str(b), "--params", "20000", "--layout", "uniform", "--pad-to", "8",
         "-o", str(folder / "posthoc" / "padded")],
        ["compose", str(a), str(b), "--weights", "0.7,-0.3", "--ranks", "40", "--heads", "first",
         "-o", str(folder / "posthoc" / "both")],
        ["export", str(a), "-o", str(folder / "posthoc" / "served"), "--pad-to", "8"],
    ]
    return commands


def differences(old: Path, new: Path) -> list[str]:
    """Every file below ``old`` that ``new`` lacks or holds otherwise."""
    found = []
    names = {p.relative_to(f) for f in (old, new) for p in f.rglob("*") if p.suffix in (".json", ".safetensors")}
    for name in sorted(names):
        one, other = old / name, new / name
        if not (one.exists() and other.exists()):
            found.append(f"{name}: only in {old if one.exists() else new}")
        elif name.name == "rankalloc_state.safetensors":
            found += [f"{name}: {line}" for line in _states(one, other)]
        elif name.suffix == ".safetensors":
            if one.read_bytes() != other.read_bytes():
                found.append(f"{name}: other bytes")
        elif name.name != "trainer_state.json":
            found += [f"{name}: {line}" for line in _unlike(json.loads(one.read_text()), json.loads(other.read_text()))]
    return found


def _states(one: Path, other: Path) -> list[str]:
    from safetensors import safe_open

    held = []
    for path in (one, other):
        with safe_open(path, "pt") as file:
            held.append((json.loads(file.metadata()["rankalloc"]), {k: file.get_tensor(k) for k in file.keys()}))
    lines = _unlike(held[0][0], held[1][0])
    tensors, others = held[0][1], held[1][1]
    if tensors.keys() != others.keys() or any(not tensors[k].equal(others[k]) for k in tensors):
        lines.append("other tensors")
    return lines


def _unlike(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [k for k in dict.fromkeys([*one, *other]) if k not in VARIABLE]
        return [line for k in keys for line in _unlike(one.get(k, "absent"), other.get(k, "absent"), f"{path}.{k}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [line for i, (a, b) in enumerate(zip(one, other, strict=True)) for line in _unlike(a, b, f"{path}[{i}]")]
    return [] if one == other else [f"{path}: {one!r:.80} and {other!r:.80}"]


def written(command: list[str]) -> bool:
    """Whether what the command writes is there."""
    folder = Path(command[command.index("--output" if "--output" in command else "-o") + 1])
    return any((folder / name).exists() for name in ("trace.json", "adapter_config.json"))


def half_done(source: Path, target: Path, steps: int) -> None:
    """A run as if it had been killed after half of its steps."""
    shutil.copytree(source, target)
    shutil.rmtree(target / f"checkpoint-{steps}", ignore_errors=True)
    shutil.rmtree(target / "adapter")
    for name in ("trace.json", "report.html"):
        (target / name).unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--methods", default=None, help="names separated by commas; all when left out")
    parser.add_argument("--keep-old", action="store_true", help="leave out what OLD has written there already")
    asked = parser.parse_args()
    import rankalloc as ra

    methods = asked.methods.split(",") if asked.methods else list(ra.METHODS)
    output = asked.output.resolve()
    old, new = output / "old", output / "new"
    output.mkdir(parents=True, exist_ok=True)
    if not asked.keep_old:
        shutil.rmtree(old, ignore_errors=True)
    wanted = [c for c in commands_of(old, methods, asked.steps) if not written(c)]
    run_commands(asked.old.resolve(), wanted, output / "old.log")
    if not (output / "sweep-old").exists():
        run_commands(asked.old.resolve(), [sweep(output / "sweep-half", 3)], output / "sweep-half.log")
        shutil.copytree(output / "sweep-half", output / "sweep-old")
        run_commands(asked.old.resolve(), [sweep(output / "sweep-old", 6)], output / "sweep-old.log")
    for name in ("new", "resumed", "sweep-new"):
        shutil.rmtree(output / name, ignore_errors=True)
    run_commands(asked.new.resolve(), commands_of(new, methods, asked.steps), output / "new.log")
    resumed = output / "resumed"
    commands = []
    for method in methods:
        half_done(old / "runs" / method, resumed / method, asked.steps)
        commands.append(train(resumed / method, asked.steps, [f"method={method}", *OPTIONS.get(method, [])], True))
    run_commands(asked.new.resolve(), commands, output / "resumed.log")
    shutil.copytree(output / "sweep-half", output / "sweep-new")
    run_commands(asked.new.resolve(), [sweep(output / "sweep-new", 6)], output / "sweep-new.log")
    pairs = [("runs and files", old, new), ("sweep", output / "sweep-old", output / "sweep-new")]
    pairs += [(f"resumed {m}", old / "runs" / m, resumed / m) for m in methods]
    bad = 0
    for what, one, other in pairs:
        lines = differences(one, other)
        bad += len(lines)
        print(f"{what}: {len(lines) or 'no'} differences", *lines[:20], sep="\n  ")
    with sqlite3.connect(output / "sweep-new" / "study.db") as database:
        print("trials in the resumed study:", database.execute("select count(*) from trials").fetchone()[0])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
