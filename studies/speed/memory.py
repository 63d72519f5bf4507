"""Memory of a run from its first step to its last: what tensors hold, and the peak of a process of its own."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

KINDS = ("frozen floor", "PEFT LoRA", "PEFT AdaLoRA", "default method")


def measure(rank: int) -> dict[str, Any]:
    """{kind: bytes at the first and the last step, peak memory of the process in KiB}, a process for each kind."""
    found = {}
    for kind in KINDS:
        command = [sys.executable, __file__, kind, "--rank", str(rank)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found[kind] = json.loads(result.stdout.splitlines()[-1])
    return found


def one(kind: str, rank: int) -> dict[str, Any]:
    import arms
    from steps import arm_bytes

    import rankalloc as ra

    budget = ra.RankBudget(fraction=1 / 3, warmup=0.0, freeze=0.25, every=1)
    arm = arms.Arm(kind, arms.bert(), arms.BERT_TARGETS, rank, total_steps=8, budget=budget)
    batch, sizes = arms.bert_batch(), []
    for step in range(8):
        arm.step(batch)
        if step in (0, 7) and arm.optimizer is not None:
            sizes.append(arm_bytes(arm))
    return {"sizes": sizes, "peak_kib": peak_kib()}


def peak_kib() -> int:
    """The largest resident size of this process so far; not getrusage's, which begins with that of the parent."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--rank", type=int, default=12)
    args = parser.parse_args()
    print(json.dumps(one(args.kind, args.rank)))
