"""What does shrinking an adapter of a 7B model cost beside loading and saving its file?

224 linear layers of a Llama 7B, rank 64, synthetic weights: 0.65 GB in float32. Shrinking and its peer (safetensors'
load_file and save_file of the same file) take turns, round after round, each in a process of its own that says how
long it took after its imports, and by how much its memory passed what the imports had taken. What is compared are
medians. Prints ratios and writes reports/speed-shrink.json.

    python studies/speed/finished.py [--rounds 5] [--rank 64] [--layers 32]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (4096, 11008), "mlp.up_proj": (4096, 11008),
    "mlp.down_proj": (11008, 4096),
}
"""(d_in, d_out) of one block."""

FRAME = """
import json, re, sys, time
{imports}
def peak():  # getrusage would count what the parent had
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before, started = peak(), time.perf_counter()
{work}
print(json.dumps({{"seconds": time.perf_counter() - started, "megabytes": peak() - before}}))
"""
WORK = {
    "shrink": (
        "import torch, numpy, safetensors.torch, rankalloc as ra\nra.shrink, ra.FinishedAdapter",
        "ra.shrink(sys.argv[1], ra.RankBudget(fraction=0.25), sys.argv[2])",
    ),
    "load and save": (
        "import torch, numpy\nfrom pathlib import Path\nfrom safetensors.torch import load_file, save_file",
        "Path(sys.argv[2]).mkdir(exist_ok=True)\n"
        "save_file(load_file(sys.argv[1] + '/adapter_model.safetensors'), sys.argv[2] + '/adapter_model.safetensors')",
    ),
}


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
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted(name.rsplit(".", 1)[-1] for name in SHAPES)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return (folder / "adapter_model.safetensors").stat().st_size


def once(kind: str, source: Path, out: Path) -> dict[str, float]:
    imports, work = WORK[kind]
    done = subprocess.run(
        [sys.executable, "-c", FRAME.format(imports=imports, work=work), str(source), str(out)], check=True,
        capture_output=True, text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    from rankalloc.files import write_json
    from rankalloc.training.environment import describe

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32, help="blocks of seven linear layers")
    parser.add_argument("--output", type=Path, default=Path("reports/speed-shrink.json"))
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in WORK}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "adapter"
        size = make(source, args.layers, args.rank)
        for number in range(args.rounds + 1):
            for kind in list(WORK)[:: 1 if number % 2 else -1]:
                measured = once(kind, source, Path(folder) / "out")
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
    })


if __name__ == "__main__":
    main()
