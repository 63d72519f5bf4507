"""How long ``rankalloc check`` takes on a rank 16 adapter of a 7B model's shapes, beside reading the file.

    python -m studies.speed.check

Both run in processes of their own: the reading is of every tensor once, by safetensors; memory is the peak of the
process above what it had after its imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from rankalloc.storage.layout import Layout
from rankalloc.storage.plain_lora import PlainLora, write

BLOCKS, RANK, WIDTH, INNER = 32, 16, 4096, 11008
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (WIDTH, INNER), "mlp.up_proj": (WIDTH, INNER),
    "mlp.down_proj": (INNER, WIDTH),
}
PROCESS = """
import json, resource, sys, time
import torch, rankalloc as ra
from safetensors import safe_open
work = sys.argv[1]
if work == "check":
    ra.check
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
if work == "check":
    found = ra.check(sys.argv[2])
else:
    with safe_open(sys.argv[2] + "/adapter_model.safetensors", "pt") as file:
        total = sum(float(file.get_tensor(key).float().sum()) for key in file.keys())
print(json.dumps({"seconds": time.perf_counter() - began,
                  "mebibytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}))
"""


def make(folder: Path) -> Path:
    """The adapter: random factors in bfloat16, of falling singular values."""
    generator = torch.Generator().manual_seed(0)
    falling = torch.logspace(0, -2, RANK)
    pairs = {}
    for block in range(BLOCKS):
        for name, (d_in, d_out) in SHAPES.items():
            a = torch.randn(RANK, d_in, generator=generator) / d_in**0.5
            b = torch.randn(d_out, RANK, generator=generator) / d_out**0.5 * falling
            pairs[f"model.layers.{block}.{name}"] = a.bfloat16(), b.bfloat16()
    return write(PlainLora(pairs), folder / "adapter", Layout("compact"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        adapter = make(Path(folder))
        size = (adapter / "adapter_model.safetensors").stat().st_size
        runs = {
            work: [json.loads(subprocess.run(
                [sys.executable, "-c", PROCESS, work, str(adapter)], capture_output=True, text=True, check=True
            ).stdout) for _ in range(3)]
            for work in ("read", "check")
        }
    best = {work: min(each, key=lambda one: one["seconds"]) for work, each in runs.items()}
    print(json.dumps({
        "layers": BLOCKS * len(SHAPES), "rank": RANK, "bytes": size, "threads": torch.get_num_threads(), **best,
        "beyond reading": best["check"]["seconds"] - best["read"]["seconds"],
    }, indent=1))


if __name__ == "__main__":
    main()
