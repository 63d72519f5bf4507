"""Memory of a run from its first step to its last: the bytes of its tensors, and the peak of a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import rankalloc as ra

from ..common import memory
from . import arms
from .steps import arm_bytes

KINDS = (arms.FLOOR, arms.PEFT_LORA, arms.PEFT_ADALORA, arms.DEFAULT)
STEPS = 8


def measure(rank: int) -> dict[str, Any]:
    """{kind: bytes at the first and the last step, peak memory of the process in KiB}, each in a fresh process."""
    found = {}
    for kind in KINDS:
        command = [sys.executable, "-m", "studies.speed.memory", kind, str(rank)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found[kind] = json.loads(result.stdout.splitlines()[-1])
    return found


def one(kind: str, rank: int) -> dict[str, Any]:
    """A run of ``kind`` in this process."""
    budget = ra.RankBudget(ranks=6 * arms.BERT_LAYERS * rank // 3, warmup=0.0, freeze=0.25, every=1)
    arm = arms.Arm(kind, arms.bert(), arms.BERT_TARGETS, rank, total_steps=STEPS, budget=budget)
    batch, sizes = arms.bert_batch(), []
    for step in range(STEPS):
        arm.step(batch)
        if step in (0, STEPS - 1) and arm.optimizer is not None:
            sizes.append(arm_bytes(arm))
    peak = memory.peak_bytes()
    return {"sizes": sizes, "peak_kib": None if peak is None else peak // 1024}


if __name__ == "__main__":
    print(json.dumps(one(sys.argv[1], int(sys.argv[2]))))
