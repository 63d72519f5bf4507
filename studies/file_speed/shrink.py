"""What does shrinking an adapter of a 7B model cost beside loading and saving its file?

    python -m studies.file_speed.shrink [--rounds 5] [--rank 64] [--layers 32] [--quick]

224 linear layers of a Llama 7B at rank 64, with synthetic weights: 0.65 GB in float32. Shrinking and its peer
(safetensors' load_file and save_file of the same file) take turns, each in a fresh process that reports how long it
took after its imports, and how far its memory rose above what the imports had taken. Medians are compared. Prints
ratios and writes reports/speed-shrink.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..common import memory
from ..common.arguments import QUICK, at_least_one, parse, parser_of

SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (4096, 11008), "mlp.up_proj": (4096, 11008),
    "mlp.down_proj": (11008, 4096),
}  # fmt: skip
"""(d_in, d_out) of one block."""
Work = Callable[[Path, Path, int], object]
"""What is done with a folder, into another, and for how many ranks."""
WEIGHTS = "adapter_model.safetensors"


def shrinking() -> Work:
    """Import what shrinking needs; returns the work itself."""
    import rankalloc as ra

    ra.shrink, ra.FinishedAdapter  # noqa: B018 - they are imported when first named
    return lambda source, out, ranks: ra.shrink(source, ra.RankBudget(ranks=ranks), out)


def copying() -> Work:
    """Import what loading and saving needs; returns the work itself."""
    import torch  # noqa: F401 - safetensors.torch imports it, and numpy, only when they are used
    from safetensors.torch import load_file, save_file

    def work(source: Path, out: Path, ranks: int) -> None:
        out.mkdir(exist_ok=True)
        save_file(load_file(source / WEIGHTS), out / WEIGHTS)

    return work


WORK = {"shrink": shrinking, "load and save": copying}


def once(kind: str, source: Path, out: Path, ranks: int) -> dict[str, float]:
    """Seconds and megabytes of one ``kind`` of work, in a fresh process."""
    command = [sys.executable, "-m", "studies.file_speed.shrink", "--measure", kind, str(source), str(out), str(ranks)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(kind: str, source: Path, out: Path, ranks: int) -> dict[str, float]:
    """The same in this process."""
    work = WORK[kind]()
    before, started = memory.peak_bytes(), time.perf_counter()
    work(source, out, ranks)
    seconds, peak = time.perf_counter() - started, memory.peak_bytes()
    return {"seconds": seconds, "megabytes": (peak - before) / 2**20}


def make(folder: Path, blocks: int, rank: int) -> int:
    """A PEFT LoRA folder with decaying spectra; returns its size in bytes."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    decay = torch.arange(1, rank + 1.0).pow(-0.5)
    tensors = {}
    for block in range(blocks):
        for name, (d_in, d_out) in SHAPES.items():
            key = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, d_in, generator=draw) * 0.01
            tensors[f"{key}.lora_B.weight"] = torch.randn(d_out, rank, generator=draw) * 0.01 * decay
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    targets = sorted(name.rsplit(".", 1)[-1] for name in SHAPES)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return (folder / WEIGHTS).stat().st_size


def main(argv: Sequence[str] | None = None) -> None:
    from rankalloc.files import write_json
    from rankalloc.training.environment import describe

    parser = parser_of("file_speed.shrink", __doc__)
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--rank", type=at_least_one, default=64)
    parser.add_argument("--layers", type=at_least_one, default=32, help="blocks of seven linear layers")
    parser.add_argument("--output", type=Path, default=Path("reports/speed-shrink.json"))
    args = parse(parser, argv, rounds=1, rank=8, layers=2, output=QUICK / "file_speed" / "speed-shrink.json")
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in WORK}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "adapter"
        size = make(source, args.layers, args.rank)
        for number in range(args.rounds + 1):
            for kind in list(WORK)[:: 1 if number % 2 else -1]:
                measured = once(kind, source, Path(folder) / "out", args.layers * len(SHAPES) * args.rank // 4)
                if number:  # the first round warms the disk's cache
                    runs[kind].append(measured)
    medians = {kind: statistics.median(run["seconds"] for run in found) for kind, found in runs.items()}
    peak = max(run["megabytes"] for run in runs["shrink"])
    ratio = medians["shrink"] / medians["load and save"]
    for kind, seconds in medians.items():
        print(f"{kind:14} {seconds:6.2f} s, peak memory {max(r['megabytes'] for r in runs[kind]):,.0f} MB")
    print(f"shrink / load and save: {ratio:.2f}, {peak:,.0f} MB for a file of {size / 1e6:,.0f} MB")
    write_json(args.output, {
        "question": __doc__.splitlines()[0], "rank": args.rank, "modules": args.layers * len(SHAPES), "bytes": size,
        "rounds": args.rounds, "median_seconds": medians, "ratio": ratio, "peak_megabytes": peak, "runs": runs,
        "environment": describe("cpu").model_dump(),
    })  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        kind, source, out, ranks = sys.argv[2:]
        print(json.dumps(measure(kind, Path(source), Path(out), int(ranks))))
    else:
        main()
