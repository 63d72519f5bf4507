"""Planners: ranks chosen before training. One file each; this is their registry."""

from __future__ import annotations

from .base import Planner
from .effective_rank import EffectiveRank
from .eva import EVA
from .fim import FIM
from .gora import GoRA
from .gradient_share import GradientShare
from .manual import Manual
from .module_types import ModuleTypes

PLANNERS: dict[str, type[Planner]] = {
    EVA.name: EVA,
    GoRA.name: GoRA,
    FIM.name: FIM,
    GradientShare.name: GradientShare,
    EffectiveRank.name: EffectiveRank,
    ModuleTypes.name: ModuleTypes,
    Manual.name: Manual,
}

__all__ = ["PLANNERS", "Planner"]
