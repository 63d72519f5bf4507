"""The methods a user names: which score, which rule, which parametrisation. Torch-free, so that
``rankalloc ls methods`` and the configuration can read it without paying for torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError, unknown


@dataclass(frozen=True)
class Method:
    """One way to choose ranks.

    Attributes:
        score: key in ``rankalloc.scores.SCORES``; None when ranks do not depend on the data.
        allocator: key in ``rankalloc.allocators.ALLOCATORS``.
        when: "during" training (ranks shrink to the budget), or "before" (adapters start at their
            final ranks).
        init: parametrisation the command line attaches with, "svd" or "lora"
            (:class:`rankalloc.adapter.Adapter`).
        orthogonal: weight of the orthogonality regulariser; 0 for none.
        options: names of the keyword options the method takes, with their meaning.
    """

    name: str
    summary: str
    score: str | None
    allocator: str
    when: Literal["during", "before"]
    init: Literal["svd", "lora"]
    orthogonal: float
    options: dict[str, str]
    source: str
    cost: str
    weakness: str


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="adalora",
            summary="sensitivity × uncertainty of each singular triplet, global top-k on a shrinking budget",
            score="sensitivity", allocator="global", when="during", init="svd", orthogonal=0.1,
            options={
                "beta1": "decay of the averaged sensitivity (0.85)",
                "beta2": "decay of the averaged uncertainty (0.85)",
                "orthogonal": "weight of the orthogonality regulariser (0.1)",
            },
            source="Zhang et al., ICLR 2023, arXiv 2303.10512",
            cost="2 × the adapter in score state, about six foreach passes over it a step",
            weakness="its scores depend on the basis P and Q happen to be in, and learning starts slowly from Λ = 0",
        ),
        Method(
            name="uniform",
            summary="plain LoRA with equal ranks everywhere that spend the same budget: the control",
            score=None, allocator="uniform", when="before", init="lora", orthogonal=0.0,
            options={},
            source="Hu et al., ICLR 2022, arXiv 2106.09685",
            cost="none",
            weakness="gives a layer that needs nothing as much as one that needs most",
        ),
    )
}


def find_method(name: str) -> Method:
    """The method of this name; a ConfigError with the nearest name when there is none."""
    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    return METHODS[name]
