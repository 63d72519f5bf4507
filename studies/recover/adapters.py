"""The adapters that this study and studies/refine work on: plain LoRA of rank 16 on punctuation, one for each seed."""

from __future__ import annotations

from pathlib import Path

from rankalloc.experiments.config import RunConfig, load_config
from rankalloc.experiments.runner import train
from rankalloc.experiments.tasks.base import PreparedTask

STEPS, RANK, RATE, WARMUP = 160, 16, 1e-3, 8
KEPT = Path("runs/recover")
"""Where finished adapters are kept, so that neither study trains them twice."""


def config_of(seed: int) -> RunConfig:
    return load_config(None, [
        "task=punctuation", f"seed={seed}", "method=uniform", "adapter.init=lora", f"adapter.rank={RANK}",
        f"adapter.alpha={2 * RANK}", "budget.fraction=1.0", f"training.steps={STEPS}", "training.batch_size=16",
        f"training.learning_rate={RATE}", f"training.warmup_steps={WARMUP}", "training.max_grad_norm=1.0",
    ])


def whole_adapter(seed: int, prepared: PreparedTask) -> Path:
    """The folder of the adapter of ``seed``, trained if it is not there."""
    folder = KEPT / str(seed)
    if not (folder / "adapter" / "adapter_config.json").exists():
        train(config_of(seed), folder, prepared=prepared, splits=())
    return folder / "adapter"
