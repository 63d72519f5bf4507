"""Shrinking beside kohya's resize and PEFT's svd, extracting beside mergekit: error, seconds and memory.

    python -m studies.file_speed.peers --kohya SD_SCRIPTS        kohya's from a checkout of kohya-ss/sd-scripts
    python -m studies.file_speed.peers --rounds 1                once, without a warm-up

All get the same files (material.py) and the same number of stored parameters, which kohya's own rules for a rank a
layer (sv_fro, sv_ratio) are searched for. Each runs in a fresh process, in turn; counted are the seconds and the growth
of the resident peak after its imports and, for PEFT, after its model and adapter were loaded. The error is
‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all layers, in float64, of what was written. Writes reports/speed-peers.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..chat import task
from ..common import memory
from ..common.arguments import QUICK, at_least_one, parse, parser_of
from ..common.table import markdown
from . import peer_work

WEIGHTS = "adapter_model.safetensors"
_HALVINGS = 10  # after which the rule's parameter is as good as found
SHRUNK, EXTRACTED = 4, 32  # the peers' uniform ranks, whose parameters are the budgets


def pairs(file: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{layer: (A, B)} of a file in PEFT's names; kohya's alpha over rank is multiplied into B."""
    tensors = load_file(file)
    found = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            alpha = tensors.get(f"{name}.alpha")
            b = tensors[f"{name}.lora_B.weight"].double() * (1 if alpha is None else float(alpha) / len(a))
            found[name] = a.double(), b
    return found


def scales(folder: Path) -> tuple[float, dict[str, float]]:
    """PEFT's factor on BA: alpha over rank, for all layers and by layer where the patterns have their own."""
    config = json.loads((folder / "adapter_config.json").read_text())
    own = {}
    for name in {*config.get("rank_pattern", {}), *config.get("alpha_pattern", {})}:
        rank = config.get("rank_pattern", {}).get(name, config["r"])
        own[name.lstrip("^").replace("\\", "")] = config.get("alpha_pattern", {}).get(name, config["lora_alpha"]) / rank
    return config["lora_alpha"] / config["r"], own


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """{layer: ΔW} in float64 of a PEFT folder."""
    general, own = scales(folder)
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): own.get(name.removeprefix(prefix), general) * (b @ a)
        for name, (a, b) in pairs(folder / WEIGHTS).items()
    }


def relative(wanted: dict[str, torch.Tensor], have: dict[str, torch.Tensor]) -> float:
    """‖Δ − Δ'‖_F / ‖Δ‖_F over all layers; a layer that is not there changes nothing."""
    left = sum(float((w - have.get(name, torch.zeros(()))).square().sum()) for name, w in wanted.items())
    return (left / sum(float(w.square().sum()) for w in wanted.values())) ** 0.5


def stored(file: Path) -> int:
    """The numbers of all pairs."""
    return sum(a.numel() + b.numel() for a, b in pairs(file).values())


def differences(material: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """{layer: W_tuned − W_base} in float64."""
    old, new = (load_file(material / which / "model.safetensors") for which in ("base", "tuned"))
    return {name: new[f"{name}.weight"].double() - old[f"{name}.weight"].double() for name in names}


def once(kind: str, options: dict[str, Any]) -> dict[str, float]:
    """Seconds and megabytes of one ``kind`` of work, in a fresh process."""
    command = [sys.executable, "-m", "studies.file_speed.peers", "--measure", kind, json.dumps(options)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(kind: str, options: dict[str, Any]) -> dict[str, float]:
    """The same in this process."""
    work = peer_work.WORK[kind](**options)
    memory.forget_peak()
    before, begun = memory.resident_bytes(), time.perf_counter()
    work()
    seconds, peak = time.perf_counter() - begun, memory.peak_bytes()
    assert before is not None and peak is not None, "this study needs Linux's counters of memory"
    return {"seconds": seconds, "megabytes": (peak - before) / 2**20}


def closest(kohya: str, rule: str, source: Path, out: Path, most: int) -> float:
    """The parameter of kohya's ``rule`` that stores most within ``most`` numbers, found by halving."""
    low, high = (0.0, 1.0) if rule == "sv_fro" else (1.0, 1e3)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2 if rule == "sv_fro" else (low * high) ** 0.5
        options = {"kohya": kohya, "source": str(source), "out": str(out), "rank": 16, "rule": rule, "value": middle}
        once("kohya", options)
        if stored(out) <= most:
            low = middle
        else:
            high = middle
    return low


def main(argv: Sequence[str] | None = None) -> None:
    from rankalloc.files import write_json
    from rankalloc.training.environment import describe

    parser = parser_of("file_speed.peers", __doc__)
    parser.add_argument("--material", type=Path, help="what material.py wrote [default: made anew]")
    parser.add_argument("--kohya", metavar="FOLDER", help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--output", type=Path, default=Path("reports/speed-peers.json"))
    args = parse(parser, argv, rounds=1, output=QUICK / "file_speed" / "speed-peers.json")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        material = args.material
        if material is None:
            material = folder / "material"
            from . import material as making

            making.main([str(material), *["--quick"] * args.quick])
        arms = _arms(material, folder, args.kohya)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
        for number in range(args.rounds + (args.rounds > 1)):
            for name in list(arms)[:: 1 if number % 2 else -1]:
                measured = once(*arms[name]["work"])
                if number or args.rounds == 1:  # the first of several rounds warms the disk's cache
                    runs[name].append(measured)
        rows = _rows(arms, runs, material)
    header = ("arm", "stored", "error", "seconds", "megabytes")
    print(markdown(header, [[str(row[column]) for column in header] for row in rows]))
    write_json(args.output, {
        "question": __doc__.splitlines()[0], "rows": rows, "runs": runs, "rounds": args.rounds,
        "environment": describe("cpu").model_dump(),
    })  # fmt: skip


def _arms(material: Path, folder: Path, kohya: str | None) -> dict[str, dict[str, Any]]:
    """{arm: what it does, and where it writes}; a peer that is not there is left out with a word."""
    adapter = material / "adapter"
    most = stored(adapter / WEIGHTS) * SHRUNK // 16
    arms: dict[str, dict[str, Any]] = {}

    def add(name: str, kind: str, out: Path, **options: Any) -> None:
        arms[name] = {"work": (kind, {**options, "out": str(out)}), "out": out}

    add("shrink: rankalloc", "shrink", folder / "shrink", source=str(adapter), params=most)
    add("shrink: PEFT svd", "peft", folder / "peft", source=str(adapter), base=str(task.unpacked()), rank=SHRUNK)
    if kohya is None:
        print("no --kohya, so its resize is not measured")
    else:
        plain = {"kohya": kohya, "source": str(adapter / WEIGHTS)}
        add("shrink: kohya", "kohya", folder / "kohya.safetensors", rank=SHRUNK, rule=None, value=None, **plain)
        for rule in ("sv_fro", "sv_ratio"):
            out = folder / f"{rule}.safetensors"
            value = closest(kohya, rule, adapter / WEIGHTS, out, most)
            add(f"shrink: kohya {rule}", "kohya", out, rank=16, rule=rule, value=value, **plain)
    both = {"base": str(material / "base"), "tuned": str(material / "tuned")}
    whole = stored(adapter / WEIGHTS) * EXTRACTED // 16  # all-linear, as the adapter
    add("extract: rankalloc", "extract", folder / "extract", params=whole, rank=2 * EXTRACTED, **both)
    if find_spec("mergekit") is None:
        print("mergekit is not installed, so it is not measured: pip install --no-deps -r "
              "studies/file_speed/requirements.txt")
    else:
        add("extract: mergekit", "mergekit", folder / "mergekit", rank=EXTRACTED, **both)
    return arms


def _rows(
    arms: dict[str, dict[str, Any]], runs: dict[str, list[dict[str, float]]], material: Path
) -> list[dict[str, Any]]:
    rows = []
    trained = updates(material / "adapter")
    changed = differences(material, list(trained))
    for name, arm in arms.items():
        out: Path = arm["out"]
        file = out if out.suffix else out / WEIGHTS
        if out.suffix:
            factor = scales(material / "adapter")[0]  # kohya's file leaves PEFT's own factor to the configuration
            prefix = "base_model.model."
            have = {k.removeprefix(prefix): factor * (b @ a) for k, (a, b) in pairs(file).items()}
        else:
            have = updates(out)
        wanted = trained if name.startswith("shrink") else changed
        rows.append({
            "arm": name, "stored": stored(file), "error": round(relative(wanted, have), 4),
            "seconds": round(statistics.median(run["seconds"] for run in runs[name]), 2),
            "megabytes": round(max(run["megabytes"] for run in runs[name])),
        })
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], json.loads(sys.argv[3]))))
    else:
        main()
