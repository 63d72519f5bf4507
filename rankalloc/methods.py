"""The methods a user names: which score, which rule, which basis. Torch-free, so that ``rankalloc ls
methods`` and the configuration can read it without paying for torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .errors import ConfigError, unknown

PLACEMENTS = ("chosen", "uniform", "random", "shuffled")
"""``placement=``: where a method's ranks go. "chosen" by the method; the others are its controls, with
the same parametrisation, schedule and peak rank: equal everywhere, drawn by chance, or its own ranks
handed to other layers."""

_SHARED = {
    "canonical": "rewrite P, Λ, Q as orthonormal factors and singular values at each allocation",
    "orthogonal": "weight of the orthogonality regulariser; 0 in the canonical basis, which needs none",
    "placement": f"{', '.join(PLACEMENTS)}: the last three are the method's own controls",
}
_BETA = {"beta": "decay of the moving average (0.85)"}
_BETAS = {
    "beta1": "decay of the averaged sensitivity (0.85)", "beta2": "decay of the averaged uncertainty (0.85)"
}


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
        canonical: whether adapters are brought to canonical form at each allocation, unless the option
            of that name says otherwise (:mod:`rankalloc.canonical`).
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
    when: Literal["during", "before"] = "during"
    init: Literal["svd", "lora"] = "svd"
    canonical: bool = True
    orthogonal: float = 0.1
    options: dict[str, str] = field(default_factory=dict)


_SMALL = "r numbers a layer in score state; QR and a small SVD at each allocation"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="adalora",
            summary="sensitivity × uncertainty of each singular triplet, global top-k on a shrinking budget",
            score="sensitivity", canonical=False, options={**_BETAS, **_SHARED},
            source="Zhang et al., ICLR 2023, arXiv 2303.10512",
            cost="2 × the adapter in score state, about six foreach passes over it a step",
            weakness="its scores depend on the basis P and Q happen to be in, and learning starts slowly from Λ = 0",
        ),
        Method(
            name="singular-value",
            summary="cut the smallest singular values of all updates, in canonical form",
            score="magnitude", options=_SHARED,
            source="Eckart and Young, 1936, at every allocation of a training run",
            cost="no score state; QR and a small SVD at each allocation",
            weakness="sees only ΔW, not what the loss makes of it",
        ),
        Method(
            name="first-order",
            summary="|λ ∂L/∂λ|: the first-order change of the loss when a triplet is taken away",
            score="first-order", options={**_BETA, **_SHARED},
            source="Molchanov et al., CVPR 2019, arXiv 1906.10771, on triplets",
            cost=_SMALL, weakness="at a minimum the gradient vanishes, and with it the score",
        ),
        Method(
            name="fisher",
            summary="½ λ² E[(∂L/∂λ)²]: the second-order change, with the empirical Fisher information",
            score="fisher", options={**_BETA, **_SHARED},
            source="LeCun et al., 1989; Theis et al., arXiv 1801.05787",
            cost=_SMALL, weakness="gradients of large batches underrate the information of single examples",
        ),
        Method(
            name="signal-to-noise",
            summary="sensitivity divided by its uncertainty",
            score="signal-to-noise", canonical=False, options={**_BETAS, **_SHARED},
            source="IGU-LoRA, arXiv 2603.13792, without its path integral",
            cost="2 × the adapter in score state, about seven foreach passes over it a step",
            weakness="a triplet that is steadily unimportant has a high ratio too",
        ),
        Method(
            name="gradient-norm",
            summary="|∂L/∂λ|: how strongly the loss pulls at a triplet, whatever its size",
            score="gradient-norm", options={**_BETA, **_SHARED},
            source="the gradient of ΔW along the triplet; compare FIM-LoRA, arXiv 2605.16800",
            cost=_SMALL, weakness="a direction that is already learned no longer pulls, and looks worthless",
        ),
        Method(
            name="magnitude",
            summary="|λ| ‖P‖ ‖Q‖ of each triplet, in whatever basis training left it",
            score="magnitude", canonical=False, options=_SHARED,
            source="magnitude pruning, Han et al., NeurIPS 2015, on triplets",
            cost="no score state", weakness="two large triplets may cancel, and size is not importance",
        ),
        Method(
            name="uniform",
            summary="plain LoRA with equal ranks everywhere that spend the same budget: the control",
            score=None, allocator="uniform", when="before", init="lora", canonical=False, orthogonal=0.0,
            source="Hu et al., ICLR 2022, arXiv 2106.09685",
            cost="none",
            weakness="gives a layer that needs nothing as much as one that needs most",
        ),
    )
}


def methods_table() -> str:
    """All methods as a Markdown table: the one in the README."""
    rows = [("method", "what it does", "cost", "source"), ("---",) * 4]
    rows += [(f"`{m.name}`", m.summary, m.cost, m.source) for m in METHODS.values()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def find_method(name: str) -> Method:
    """The method of this name; a ConfigError with the nearest name when there is none."""
    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    return METHODS[name]
