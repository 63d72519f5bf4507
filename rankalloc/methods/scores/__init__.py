"""Importance scores. One file each; this is their registry."""

from __future__ import annotations

from .base import LambdaScore, Score
from .energy import Energy
from .first_order import FirstOrder
from .fisher import Fisher
from .gate import Gate
from .gradient_norm import GradientNorm
from .magnitude import Magnitude
from .sensitivity import Sensitivity
from .signal_to_noise import SignalToNoise
from .weighted_energy import WeightedEnergy

SCORES: dict[str, type[Score]] = {
    Sensitivity.name: Sensitivity,
    SignalToNoise.name: SignalToNoise,
    FirstOrder.name: FirstOrder,
    Fisher.name: Fisher,
    GradientNorm.name: GradientNorm,
    Magnitude.name: Magnitude,
    Energy.name: Energy,
    WeightedEnergy.name: WeightedEnergy,
    Gate.name: Gate,
}

__all__ = ["SCORES", "LambdaScore", "Score"]
