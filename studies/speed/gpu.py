"""What does choosing ranks cost on a GPU: time, kernels, synchronisations and memory of a step, and an allocation?

    python studies/speed/gpu.py                                            # all shapes, bf16 and 4 bits
    python studies/speed/gpu.py --shapes llama-8b --precision bf16         # some of it
    python studies/speed/gpu.py --device cpu --tiny                        # tries everything out in seconds

Needs torch, transformers, peft and pydantic, and bitsandbytes for 4 bits; rankalloc itself need not be installed, and
nothing is downloaded. What fails becomes a row with the reason. README.md in this folder says how things are measured.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

if not __package__:
    # as a script: this folder's memory.py or steps.py must not hide a module of that name, and the root has rankalloc
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from rankalloc.errors import RankallocError
from rankalloc.files import write_json, write_text
from studies.common.arguments import at_least_one
from studies.common.table import markdown
from studies.speed import gpu_measures as measures
from studies.speed.arms import ratio
from studies.speed.gpu_arms import ARMS, FLOOR, PEFT_LORA, PRECISIONS, SHAPES, TINY, Arm, Shape, decoder
from studies.speed.gpu_measures import reason

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
OWN_PHASES = ("observe", "update")
"""The phases of a step that only a method has."""


def measure(shape: Shape, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row for each arm, at one shape and precision; {what: reason} under "missing" for all that failed."""
    device, layers = torch.device(args.device), min(args.layers, shape.layers)
    ids = torch.randint(0, args.vocabulary, (args.batch, args.tokens), device=device)
    batch = {"input_ids": ids, "labels": ids}
    rows: dict[str, dict[str, Any]] = {kind: {"missing": {}} for kind in ARMS}
    arms: dict[str, Arm] = {}

    def attempt(kind: str, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever it is, it belongs to this row, and the others go on
            rows[kind]["missing"][what] = reason(error)
            return None

    def built(kind: str) -> Arm:
        arm = Arm(kind, decoder(shape, layers, args.vocabulary, precision, device), batch, args.rank)
        for _ in range(3):
            arm.step()
        return arm

    if device.type == "cuda":
        # what libraries set up at their first use (handles, workspaces) would be counted as the first arm's memory
        attempt(FLOOR, "arm", lambda: built(FLOOR))
    for kind in ARMS:
        before = measures.allocated(device) if device.type == "cuda" else 0
        arm = attempt(kind, "arm", lambda kind=kind: built(kind))
        if arm is None:
            continue
        arms[kind] = arm
        if device.type == "cuda":
            rows[kind]["peak bytes"] = attempt(
                kind, "peak memory", lambda arm=arm, before=before: measures.peak_bytes(arm, before)
            )
        else:
            rows[kind]["missing"]["peak memory"] = "measured on a GPU only"
    times = interleaved(arms, args.rounds, args.steps, attempt)
    for kind, arm in arms.items():
        row = rows[kind]
        row["seconds"] = times[kind]
        row["calls"] = attempt(kind, "calls", lambda arm=arm: measures.by_phase(arm, measures.calls))
        if device.type == "cuda":
            row["synchronisations"] = attempt(
                kind, "synchronisations", lambda arm=arm: measures.by_phase(arm, measures.synchronisations)
            )
        if arm.allocates:
            row["allocation"] = attempt(kind, "allocation", lambda arm=arm: measures.allocation(arm))
    modules = 7 * layers
    related(rows, modules)
    return {
        "shape": shape._asdict(), "layers": layers, "modules": modules, "precision": precision, "rank": args.rank,
        "batch": args.batch, "tokens": args.tokens, "vocabulary": args.vocabulary, "arms": rows,
    }


def interleaved(
    arms: dict[str, Arm], rounds: int, steps: int, attempt: Callable[[str, str, Callable[[], Any]], Any]
) -> dict[str, list[float]]:
    """Median seconds a step of every arm, by round; one that fails leaves the rounds.

    All take their turns in each round, and every other round goes backwards, so that drift meets all arms equally.
    """
    times: dict[str, list[float]] = {kind: [] for kind in arms}
    running = list(arms)
    for number in range(rounds):
        for kind in running[:: 1 if number % 2 else -1]:
            seconds = attempt(kind, "step time", lambda kind=kind: measures.step_seconds(arms[kind], steps))
            if seconds is None:
                running.remove(kind)
                times[kind] = []
            else:
                times[kind].append(seconds)
    return times


def related(rows: dict[str, dict[str, Any]], modules: int) -> None:
    """Add to each row what follows from two of them: ratios to PEFT LoRA, and calls a module above the floor's."""
    reference, floor = rows[PEFT_LORA].get("seconds"), total(rows[FLOOR].get("calls"))
    for row in rows.values():
        seconds, calls = row.get("seconds"), row.get("calls")
        if seconds and reference:
            row["ratio"] = ratio(seconds, reference)
        if calls and floor is not None:
            row["calls a module"] = (total(calls) - floor) / modules
            row["own calls a module"] = (total({p: n for p, n in calls.items() if p in OWN_PHASES}) or 0) / modules
        if seconds and row.get("allocation"):
            row["allocation"]["steps"] = row["allocation"]["seconds"] / statistics.median(seconds)


def total(calls: dict[str, dict[str, int]] | None) -> int | None:
    """Kernels of all phases, or operators where there is no GPU."""
    return None if calls is None else sum(one.get("kernels", one.get("operators", 0)) for one in calls.values())


def table(record: dict[str, Any]) -> str:
    """All that was measured, in Markdown."""
    on_gpu = record["environment"]["gpu"] is not None
    calls = "kernels" if on_gpu else "operators"
    header = (
        "arm", "step, ms", f"× {PEFT_LORA} (quartiles)", f"{calls} a module above the floor's",
        "of these in observe and update", "synchronisations a step", "peak memory, MiB", "one allocation, ms",
        "in steps", f"{calls} of it", "synchronisations of it",
    )
    parts = ["# Choosing ranks on " + (record["environment"]["gpu"] or "a CPU"), _environment(record["environment"])]
    for name, found in record["measured"].items():
        parts.append(
            f"## {name}\n\n{found['layers']} of {found['shape']['layers']} layers ({found['modules']} adapted modules) "
            f"of width {found['shape']['width']}, random weights, vocabulary {found['vocabulary']}; batch "
            f"{found['batch']} × {found['tokens']} tokens; rank {found['rank']}."
        )
        parts.append(markdown(header, [_cells(kind, row) for kind, row in found["arms"].items()]))
        missing: dict[str, list[str]] = {}
        for kind, row in found["arms"].items():
            for what, why in row["missing"].items():
                if what != "arm":  # the table says that one
                    missing.setdefault(f"{what}: {why}", []).append(kind)
        parts += [f"- No {what} ({', '.join(kinds)})" for what, kinds in missing.items()]
        parts += [
            f"- {kind} waits in a step at {_listed(places)}"
            for kind, row in found["arms"].items() if (places := _places(row.get("synchronisations")))
        ]
    for name, found in record["factorisations"].items():
        cells: dict[tuple[int, str], dict[str, str]] = {}
        for one in found["rows"]:
            shown = _number(1000 * one["seconds"]) if "seconds" in one else one["reason"]
            cells.setdefault((one["rank"], one["what"]), {})[one["dtype"]] = shown
        parts.append(f"## Factorisations for {name}: {found['matrices']} matrices of {found['width']} × r")
        parts.append(markdown(
            ("r", "what", "float32, ms for all", "float64, ms for all"),
            [(str(rank), what, own["float32"], own["float64"]) for (rank, what), own in cells.items()],
        ))
    return "\n\n".join(parts).replace("\n\n- ", "\n- ").replace("|\n- ", "|\n\n- ") + "\n"


def _cells(kind: str, row: dict[str, Any]) -> list[str]:
    if "arm" in row["missing"]:
        return [kind, f"missing: {row['missing']['arm']}", *[""] * 9]
    seconds, compared, allocation = row.get("seconds"), row.get("ratio"), row.get("allocation") or {}
    return [
        kind, _number(1000 * statistics.median(seconds)) if seconds else "",
        f"{compared['ratio']:.3f} ({compared['low']:.3f}–{compared['high']:.3f})" if compared else "",
        _number(row.get("calls a module")), _number(row.get("own calls a module")),
        _number(sum(_places(row["synchronisations"]).values())) if row.get("synchronisations") else "",
        _number(row["peak bytes"] / 2**20) if row.get("peak bytes") else "",
        _number(1000 * allocation["seconds"]) if allocation else "", _number(allocation.get("steps")),
        _number(total({"": allocation["calls"]})) if allocation else "",
        _number(sum(allocation["synchronisations"].values())) if "synchronisations" in allocation else "",
    ]


def _places(by_phase: dict[str, dict[str, int]] | None) -> dict[str, int]:
    found: dict[str, int] = {}
    for places in (by_phase or {}).values():
        for place, count in places.items():
            found[place] = found.get(place, 0) + count
    return found


def _listed(places: dict[str, int]) -> str:
    return ", ".join(f"{place} ({count})" for place, count in places.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.3g}"


def _environment(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{versions}, CUDA {found['cuda']}, {found['threads']} threads, Python {found['python']}."


def environment(device: torch.device) -> dict[str, Any]:
    """The device and the versions that decide the numbers; without rankalloc's own, which may lack a package here."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None, "cuda": torch.version.cuda,
        "python": platform.python_version(), "threads": torch.get_num_threads(), "versions": versions,
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 … or cpu (cuda)")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="default: all")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: both")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few rounds: only tries the script out")
    parser.add_argument("--layers", type=at_least_one, default=4, help="decoder layers of each model (4)")
    parser.add_argument("--vocabulary", type=at_least_one, default=4096, help="of each model (4096)")
    parser.add_argument("--batch", type=at_least_one, default=4, help="rows of a batch (4)")
    parser.add_argument("--tokens", type=at_least_one, default=512, help="tokens of a row (512)")
    parser.add_argument("--rank", type=at_least_one, default=16, help="of every adapter at the start (16)")
    parser.add_argument("--rounds", type=at_least_one, default=20, help="rounds of all arms in turn (20)")
    parser.add_argument("--steps", type=at_least_one, default=5, help="timed steps of an arm in a round (5)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder for gpu.json, gpu.md (runs/gpu)")
    words = sys.argv[1:] if argv is None else list(argv)
    if "--tiny" in words:
        parser.set_defaults(layers=2, vocabulary=64, batch=2, tokens=8, rank=4, rounds=3, steps=2)
    args = parser.parse_args(words)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        parser.error(f"--device {args.device} cannot be used here ({reason(error)}); try --device cpu --tiny")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events and the profiler go by the current one
    shapes = TINY if args.tiny else {name: SHAPES[name] for name in args.shapes}
    record: dict[str, Any] = {
        "question": __doc__.splitlines()[0], "environment": environment(device), "measured": {}, "factorisations": {}
    }

    def save() -> None:
        write_json(args.output / "gpu.json", record)
        write_text(args.output / "gpu.md", table(record))

    try:
        save()  # a folder that cannot be written to is found before anything is measured
    except RankallocError as error:
        sys.exit(str(error))
    for name, shape in shapes.items():
        for precision in args.precision:
            print(f"{name}, {precision} …", file=sys.stderr, flush=True)
            record["measured"][f"{name}, {precision}"] = measure(shape, precision, args)
            save()
    for name, shape in shapes.items():
        print(f"factorisations for {name} …", file=sys.stderr, flush=True)
        matrices = 7 * shape.layers  # of the whole model: one factor of each adapted module
        record["factorisations"][name] = {
            "matrices": matrices, "width": shape.width,
            "rows": measures.factorisations(matrices, shape.width, (8, 16, 64), device),
        }
        save()
    print(table(record))


if __name__ == "__main__":
    main()
