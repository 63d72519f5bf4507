"""rankalloc: decide where a fine-tuning rank budget goes, show whether it helped, ship plain LoRA.

Names are imported when first used, so that ``import rankalloc`` and ``rankalloc --help`` stay light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Adapters": "adapters.adapter_set",
    "attach": "storage.model_saving",
    "adopt": "adapters.adopting",
    "detach": "adapters.attaching",
    "merge": "adapters.merging",
    "RankBudget": "budget",
    "LayerShape": "budget",
    "RankController": "training.controller",
    "RankCallback": "training.callback",
    "METHODS": "methods",
    "SCORES": "methods.scores",
    "ALLOCATORS": "methods.allocators",
    "save": "storage.saving",
    "load": "storage.loading",
    "check": "posthoc.checking",
    "READERS": "storage.readers",
    "export": "storage.exporting",
    "import_lora": "storage.importing",
    "AdapterLibrary": "storage.library",
    "extract": "posthoc.extracting",
    "FinishedAdapter": "storage.reading",
    "load_task": "experiments.tasks",
    "RankTrace": "trace",
    "SweepRecord": "trace",
    "write_report": "report",
    "RankallocError": "errors",
    "plan_ranks": "methods.planners.planning",
    "keep_freed_memory": "training.host_memory",
    "at_rank": "adapters.nested",
    "shrink": "posthoc.shrinking",
    "compose": "posthoc.composing",
    "mix": "posthoc.mixing",
    "load_mixture": "posthoc.mixing",
    "Mixture": "posthoc.mixture",
    "KroneckerMetric": "posthoc.metric",
    "calibrate": "posthoc.calibration",
    "sensitivities": "posthoc.sensitivity",
    "refine": "posthoc.refining",
    "frontier": "posthoc.frontier",
    "smallest": "posthoc.smallest",
    "TaskEvaluator": "experiments.judging",
    "recover": "experiments.recovering",
    "audit": "experiments.audits.audit",
    "AuditRecord": "audit_record",
    # what a score, an allocator, a rule or a planner of one's own is made from (docs/extending.md)
    "Method": "methods",
    "Score": "methods.scores",
    "LambdaScore": "methods.scores",
    "Demand": "methods.allocators",
    "fill": "methods.allocators.base",
    "Rule": "methods.rules",
    "RULES": "methods.rules",
    "Planner": "methods.planners",
    "PLANNERS": "methods.planners",
    "constant": "methods.planners.base",
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
