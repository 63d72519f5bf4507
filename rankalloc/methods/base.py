"""A method: its score, its rule, its basis, and the words the user reads about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PLACEMENTS = ("chosen", "uniform", "random", "shuffled", "grouped")
"""``placement=``: where a method's ranks go. "chosen" by the method; the others are its controls, with
the same parametrisation, schedule and peak rank: equal everywhere, drawn by chance, its own ranks
handed to other layers, or one rank for all layers of a module type."""

ANY_METHOD = ("shrink", "seed")
"""Options that the controller takes whichever the method; ``method_options`` may hold them too."""

SHARED = {
    "canonical": "rewrite P, Λ, Q as orthonormal factors and singular values at each allocation",
    "orthogonal": "weight of the orthogonality regulariser; 0 in the canonical basis, which needs none",
    "placement": f"{', '.join(PLACEMENTS)}: all but the first are the method's own controls",
    "routing": "in mixtures of experts: weigh an expert's scores by its share of the tokens (False)",
}
"""Options of every method that trains P, Λ and Q."""

@dataclass(frozen=True)
class Method:
    """One way to choose ranks.

    Attributes:
        score: key in ``rankalloc.methods.scores.SCORES``; None when ranks do not depend on the training.
        allocator: key in ``rankalloc.methods.allocators.ALLOCATORS``.
        rule: key in ``rankalloc.methods.rules.RULES``: what happens around each step while training.
        planner: key in ``rankalloc.methods.planners.PLANNERS``: what chooses before training, mostly by looking at
            data; None when nothing does.
        when: "during" training (ranks reach the budget while training), or "before" (adapters start at
            their final ranks).
        init: parametrisation the method trains, a key of ``rankalloc.adapters.triplets.TRAINED``. One of "bottleneck"
            is a baseline that is no LoRA: see :attr:`lora`.
        canonical: whether adapters are brought to canonical form at each allocation, unless the option
            of that name says otherwise (:mod:`rankalloc.adapters.canonical`).
        shrinks: when dropped triplets leave memory: "events", at every allocation, or "freeze"
            (:class:`rankalloc.RankController`).
        orthogonal: weight of the orthogonality regulariser outside the canonical basis; 0 for none.
        options: names of the keyword options the method takes, with their meaning.
    """

    name: str
    summary: str
    score: str | None
    source: str
    cost: str
    weakness: str
    allocator: str = "global"
    rule: str = "shrink"
    planner: str | None = None
    when: Literal["during", "before"] = "during"
    init: Literal["svd", "lora", "gate", "bottleneck"] = "svd"
    canonical: bool = True
    shrinks: Literal["events", "freeze"] = "freeze"
    orthogonal: float = 0.1
    options: dict[str, str] = field(default_factory=dict)

    @property
    def lora(self) -> bool:
        """Whether what it trains is a plain LoRA: it can be exported, merged, shrunk, composed and mixed, and its ranks
        can be placed by any control. A bottleneck is saved and loaded in a format of its own, and nothing else."""
        return self.init != "bottleneck"
