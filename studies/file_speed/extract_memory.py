"""Peak memory of ``rankalloc.extract`` on a synthetic pair of checkpoints, beside the size of their largest matrix.

    python -m studies.file_speed.extract_memory                  2 GB a checkpoint, bfloat16, in shards
    python -m studies.file_speed.extract_memory --quick          a small pair
    python -m studies.file_speed.extract_memory --threads 2      on two threads of torch instead of one

Weights are random; the tuned ones add rank 8 and, in every other layer, noise in all directions, so that the
randomised decomposition has both an easy and a hard case. Prints one JSON document, and its progress on stderr. What is
reported is how far the resident peak rises above what was resident before, after a warm-up on 4 such matrices
(libraries keep buffers): in bytes, in largest matrices (float32) and in checkpoints. Linux only: the kernel's
high-water mark is reset for it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

import rankalloc as ra

from ..common import memory
from ..common.arguments import at_least_one, parse, parser_of

RANKS = 64


def write_pair(folder: Path, side: int, matrices: int, shard_bytes: int) -> int:
    """Base and tuned checkpoints of ``matrices`` square matrices; the bytes of one of them."""
    generator = torch.Generator().manual_seed(0)
    per_shard = max(1, shard_bytes // (2 * side * side))
    places: dict[str, str] = {}
    for name in ("base", "tuned"):
        (folder / name).mkdir(parents=True)
    progress = Progress(f"writing {folder.name}")
    for start in range(0, matrices, per_shard):
        base, tuned = {}, {}
        for index in range(start, min(matrices, start + per_shard)):
            key = f"layers.{index}.proj.weight"
            progress(index, matrices, key)
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
        self.begun = self.shown = time.perf_counter()

    def __call__(self, done: int, total: int, name: str) -> None:
        now = time.perf_counter()
        if now - self.shown >= 5:
            self.shown = now
            print(f"{self.label}: {done}/{total} after {now - self.begun:.0f} s", file=sys.stderr, flush=True)


def measure(folder: Path, threads: int) -> dict[str, float]:
    """The growth of the resident peak and the time, in this process."""
    torch.set_num_threads(threads)
    budget, how = ra.RankBudget(ranks=RANKS), {"rank": 16, "layout": "compact"}
    ra.extract(folder / "small" / "base", folder / "small" / "tuned", budget, folder / "small" / "out", **how)
    memory.forget_peak()
    before, start = memory.resident_bytes(), time.perf_counter()
    done = ra.extract(
        folder / "big" / "base", folder / "big" / "tuned", budget, folder / "big" / "out",
        progress=Progress("extracting"), **how,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    grown, exact = memory.peak_bytes() - before, sum(layer.exact for layer in done.layers)
    return {"grown_bytes": grown, "seconds": seconds, "threads": threads, "exact_layers": exact}


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("file_speed.extract_memory", __doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of one checkpoint")
    parser.add_argument("--side", type=at_least_one, default=2048, help="of the square matrices")
    parser.add_argument("--threads", type=at_least_one, default=1, help="of torch, while extracting")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parse(parser, argv, gigabytes=0.01, side=512)
    if args.measure:
        print(json.dumps(measure(args.measure, args.threads)))
        return
    with tempfile.TemporaryDirectory(prefix="rankalloc-extract-") as temporary:
        folder = Path(temporary)
        write_pair(folder / "small", args.side, 4, 500_000_000)
        count = max(8, round(args.gigabytes * 1e9 / (2 * args.side**2)))
        size = write_pair(folder / "big", args.side, count, 500_000_000)
        command = [sys.executable, "-m", "studies.file_speed.extract_memory", "--measure", str(folder)]
        done = subprocess.run(
            [*command, "--threads", str(args.threads)], stdout=subprocess.PIPE, text=True, check=True
        )
    result = json.loads(done.stdout.splitlines()[-1])
    largest = 4 * args.side**2
    print(json.dumps({
        "checkpoint_bytes": size, "matrices": count, "largest_matrix_float32_bytes": largest, **result,
        "grown_in_largest_matrices": round(result["grown_bytes"] / largest, 2),
        "grown_in_checkpoints": round(result["grown_bytes"] / size, 4),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
