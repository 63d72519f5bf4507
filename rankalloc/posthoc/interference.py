"""How much adapters interfere with each other: principal angles between their subspaces, layer by layer.

Two updates do not affect each other when their column spaces (what they write) and row spaces (what they read) are
orthogonal. The angles are those of Björck and Golub (1973); ``overlap`` is their mean cos², 0 for orthogonal and 1 for
nested subspaces, and ``alignment`` is the cosine between the updates themselves, from ⟨ΔW₁, ΔW₂⟩_F.

Known weakness: angles give a strong and a weak direction the same weight; alignment does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..lowrank import Factors, bases, principal_angles


@dataclass(frozen=True)
class Interference:
    """Two adapters in one layer: ``first`` and ``second`` are their positions; angles are in degrees, rising."""

    first: int
    second: int
    output_angles: list[float]
    input_angles: list[float]
    output_overlap: float
    input_overlap: float
    alignment: float


def interference_of(parts: list[tuple[int, Factors]]) -> list[Interference]:
    """The interference of each pair of updates of one layer, which are given as (position, factors)."""
    spaces = [(position, factors, *bases(factors)) for position, factors in parts]
    found = []
    for index, (first, one, out_1, in_1) in enumerate(spaces):
        for second, two, out_2, in_2 in spaces[index + 1 :]:
            outputs, inputs = principal_angles(out_1, out_2), principal_angles(in_1, in_2)
            found.append(Interference(
                first, second, outputs.tolist(), inputs.tolist(), _overlap(outputs), _overlap(inputs),
                _alignment(one, two),
            ))
    return found


def _overlap(angles: torch.Tensor) -> float:
    return float(torch.deg2rad(angles).cos().square().mean()) if len(angles) else 0.0


def _alignment(one: Factors, two: Factors) -> float:
    def inner(a: Factors, b: Factors) -> float:
        # ⟨P₁D₁Q₁, P₂D₂Q₂⟩ = Σ (D₁ P₁ᵀP₂ D₂) ∘ (Q₁Q₂ᵀ)
        left = a.diagonal()[:, None] * (a.P.double().T @ b.P.double()) * b.diagonal()
        return float((left * (a.Q.double() @ b.Q.double().T)).sum())

    size = (inner(one, one) * inner(two, two)) ** 0.5
    return inner(one, two) / size if size > 0 else 0.0
