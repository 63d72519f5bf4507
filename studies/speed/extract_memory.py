"""Peak memory of ``rankalloc.extract`` on a synthetic pair of checkpoints, beside the size of their largest matrix.

    python studies/speed/extract_memory.py                       2 GB a checkpoint, bfloat16, in shards
    python studies/speed/extract_memory.py --gigabytes 0.2       a quick look
    python studies/speed/extract_memory.py --threads 2           on as many threads of torch; 1 without it

Weights are random; the tuned ones add rank 8 and, in every other layer, noise in all directions, so that the
randomised decomposition has both an easy and a hard case. Prints one JSON document, and on stderr how far it is: by how
much the resident peak is above what
was resident before, after a warm-up pair of 4 such matrices (libraries keep buffers of their own); in bytes, in largest
matrices (float32) and in checkpoints. Linux only: the kernel's own high-water mark (VmHWM) is reset for it, since that
of getrusage is inherited from the parent process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

RANKS = 64


def write_pair(folder: Path, side: int, matrices: int, shard_bytes: int) -> int:
    """Base and tuned checkpoints of ``matrices`` square matrices; the bytes of one of them."""
    generator = torch.Generator().manual_seed(0)
    per_shard = max(1, shard_bytes // (2 * side * side))
    places: dict[str, str] = {}
    for name in ("base", "tuned"):
        (folder / name).mkdir(parents=True)
    tell = Progress(f"writing {folder.name}")
    for start in range(0, matrices, per_shard):
        base, tuned = {}, {}
        for index in range(start, min(matrices, start + per_shard)):
            key = f"layers.{index}.proj.weight"
            tell(index, matrices, key)
            weight = torch.randn(side, side, generator=generator) * side**-0.5
            p, q = torch.randn(side, 8, generator=generator), torch.randn(8, side, generator=generator)
            change = 0.1 / side * p @ q
            if index % 2:
                change += 0.01 * side**-0.5 * torch.randn(side, side, generator=generator)
            base[key], tuned[key] = weight.bfloat16(), (weight + change).bfloat16()
            places[key] = f"model-{start:05d}.safetensors"
        save_file(base, folder / "base" / f"model-{start:05d}.safetensors")
        save_file(tuned, folder / "tuned" / f"model-{start:05d}.safetensors")
    for name in ("base", "tuned"):
        (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))


class Progress:
    """The ``progress`` of an extraction: a line on stderr every few seconds."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.begun = self.told = time.perf_counter()

    def __call__(self, done: int, total: int, name: str) -> None:
        now = time.perf_counter()
        if now - self.told >= 5:
            self.told = now
            print(f"{self.label}: {done}/{total} after {now - self.begun:.0f} s", file=sys.stderr, flush=True)


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure(folder: Path, threads: int) -> dict[str, float]:
    """In a process of its own: the resident peak's growth, and the time."""
    import rankalloc as ra

    torch.set_num_threads(threads)
    budget, how = ra.RankBudget(ranks=RANKS), {"rank": 16, "layout": "compact"}
    ra.extract(folder / "small" / "base", folder / "small" / "tuned", budget, folder / "small" / "out", **how)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before, start = resident("VmRSS"), time.perf_counter()
    done = ra.extract(
        folder / "big" / "base", folder / "big" / "tuned", budget, folder / "big" / "out",
        progress=Progress("extracting"), **how,
    )
    seconds = time.perf_counter() - start
    grown, exact = resident("VmHWM") - before, sum(layer.exact for layer in done.layers)
    return {"grown_bytes": grown, "seconds": seconds, "threads": threads, "exact_layers": exact}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of one checkpoint")
    parser.add_argument("--side", type=int, default=2048, help="of the square matrices")
    parser.add_argument("--threads", type=int, default=1, help="of torch, while extracting")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.measure:
        print(json.dumps(measure(options.measure, options.threads)))
        return
    with tempfile.TemporaryDirectory(prefix="rankalloc-extract-") as temporary:
        folder = Path(temporary)
        write_pair(folder / "small", options.side, 4, 500_000_000)
        count = max(8, round(options.gigabytes * 1e9 / (2 * options.side**2)))
        size = write_pair(folder / "big", options.side, count, 500_000_000)
        command = [sys.executable, __file__, "--measure", str(folder), "--threads", str(options.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    largest = 4 * options.side**2
    print(json.dumps({
        "checkpoint_bytes": size, "matrices": count, "largest_matrix_float32_bytes": largest, **result,
        "grown_in_largest_matrices": round(result["grown_bytes"] / largest, 2),
        "grown_in_checkpoints": round(result["grown_bytes"] / size, 4),
    }, indent=1))


if __name__ == "__main__":
    main()
