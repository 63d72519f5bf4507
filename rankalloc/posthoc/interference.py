"""How much adapters get in each other's way: principal angles between their subspaces, layer by layer.

Two updates whose column spaces (what they write) and row spaces (what they read) stand at right angles add up without
touching each other. Angles are those of Björck and Golub (1973); ``overlap`` is the mean cos² over them, 0 for
orthogonal and 1 for nested subspaces, and ``alignment`` the cosine between the updates themselves, ⟨ΔW₁, ΔW₂⟩_F.

Known weakness: angles weigh a strong and a weak direction alike; alignment does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..lowrank import Factors, bases, principal_angles


@dataclass(frozen=True)
class Meeting:
    """Two adapters in one layer. ``first`` and ``second`` are their positions; angles in degrees, rising."""

    first: int
    second: int
    output_angles: list[float]
    input_angles: list[float]
    output_overlap: float
    input_overlap: float
    alignment: float


def meetings(parts: list[tuple[int, Factors]]) -> list[Meeting]:
    """Every pair of updates of one layer, each given as (position, factors)."""
    spaces = [(position, factors, *bases(factors)) for position, factors in parts]
    found = []
    for index, (first, one, out_1, in_1) in enumerate(spaces):
        for second, two, out_2, in_2 in spaces[index + 1 :]:
            angles = principal_angles(out_1, out_2), principal_angles(in_1, in_2)
            shares = [float(torch.deg2rad(a).cos().square().mean()) if len(a) else 0.0 for a in angles]
            found.append(Meeting(first, second, *(a.tolist() for a in angles), *shares, _alignment(one, two)))
    return found


def _alignment(one: Factors, two: Factors) -> float:
    def inner(a: Factors, b: Factors) -> float:
        # ⟨P₁D₁Q₁, P₂D₂Q₂⟩ = Σ (D₁ P₁ᵀP₂ D₂) ∘ (Q₁Q₂ᵀ)
        left = a.diagonal()[:, None] * (a.P.double().T @ b.P.double()) * b.diagonal()
        return float((left * (a.Q.double() @ b.Q.double().T)).sum())

    size = (inner(one, one) * inner(two, two)) ** 0.5
    return inner(one, two) / size if size > 0 else 0.0
