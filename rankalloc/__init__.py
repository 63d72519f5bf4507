"""rankalloc: decide where a fine-tuning rank budget goes, show whether it helped, ship plain LoRA.

Names are imported when first used, so that ``import rankalloc`` and ``rankalloc --help`` stay light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Adapters": "adapters",
    "attach": "attachment",
    "detach": "attachment",
    "merge": "merging",
    "RankBudget": "budget",
    "LayerShape": "budget",
    "RankController": "controller",
    "RankCallback": "callback",
    "METHODS": "methods",
    "SCORES": "scores",
    "ALLOCATORS": "allocators",
    "save": "adapter_io",
    "load": "adapter_load",
    "export": "interchange",
    "import_lora": "interchange",
    "AdapterLibrary": "library",
    "extract": "posthoc.extract",
    "FinishedAdapter": "finished",
    "load_task": "tasks",
    "RankTrace": "trace",
    "SweepRecord": "trace",
    "write_report": "report",
    "RankallocError": "errors",
    "plan_ranks": "planning",
    "keep_freed_memory": "host_memory",
    "at_rank": "nested",
    "shrink": "posthoc.shrinking",
    "compose": "posthoc.composing",
    "KroneckerMetric": "posthoc.metric",
    "calibrate": "posthoc.calibration",
    "frontier": "posthoc.frontier",
    "smallest": "posthoc.smallest",
    "TaskEvaluator": "posthoc.judging",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankalloc' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
