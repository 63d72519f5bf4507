"""Methods that choose ranks before training: adapters begin, and end, with them."""

from __future__ import annotations

from typing import Any

from .base import PLACEMENTS, Method

_PLACED = {"placement": f"{', '.join(PLACEMENTS)}: all but the first are the method's own controls"}
_DATA = {"max_batches": "training batches to look at, at most (8)", **_PLACED}
_BEFORE: dict[str, Any] = {
    "score": None, "when": "before", "init": "lora", "canonical": False, "orthogonal": 0.0,
}
_GRADIENT = "a forward and a backward pass a batch; 4 bytes of host memory for each adapted weight"

BEFORE = (
    Method(
        name="uniform",
        summary="plain LoRA with equal ranks everywhere that spend the same budget: the control",
        allocator="uniform", **_BEFORE,
        source="Hu et al., ICLR 2022, arXiv 2106.09685",
        cost="none",
        weakness="gives a layer that needs nothing as much as one that needs most",
    ),
    Method(
        name="eva",
        summary="ranks to the directions that explain most of the inputs' variance, which are also the start of Q",
        planner="eva", allocator="global", **_BEFORE,
        options={
            **_DATA, "tau": "cosine from which a component has converged (0.99)",
            "passes": "times the batches are gone through, at most (16)",
        },
        source="Paischer et al., arXiv 2410.07170",
        cost="a forward pass and one small randomised SVD for each distinct input a batch",
        weakness="the variance of the inputs is not that of the task: labels are ignored",
    ),
    Method(
        name="gora",
        summary="ranks ∝ mean |W ⊙ ∂L/∂W|, and a start one projected gradient step downhill",
        planner="gora", allocator="proportional", **_BEFORE,
        options={**_DATA, "gamma": "size of that first step, halved until the loss falls (0.05)"},
        source="He et al., arXiv 2502.12171",
        cost=_GRADIENT,
        weakness="rates how much the loss depends on the present weights, not on the update to come",
    ),
    Method(
        name="fim",
        summary="ranks ∝ the empirical Fisher information of LoRA's zero factor, E[(∂L/∂P)²]",
        planner="fisher", allocator="proportional", **_BEFORE, options=_DATA,
        source="FIM-LoRA, arXiv 2605.16800",
        cost="a forward and a backward pass a batch through adapters of the peak rank",
        weakness="its author found it no better than LoRA; large batches underrate single examples",
    ),
    Method(
        name="gradient-share",
        summary="ranks ∝ ‖∂L/∂W‖ of each layer",
        planner="gradient-norm", allocator="proportional", **_BEFORE, options=_DATA,
        source="the quantity LoRA-GA, arXiv 2407.05000, begins from",
        cost=_GRADIENT,
        weakness="what pulls hardest at first may be learned in few steps and few directions",
    ),
    Method(
        name="effective-rank",
        summary="ranks ∝ the effective rank of ∂L/∂W, exp(entropy of its singular values)",
        planner="effective-rank", allocator="proportional", **_BEFORE, options=_DATA,
        source="Roy and Vetterli, EUSIPCO 2007, as used by RaLoRA",
        cost=_GRADIENT + "; an SVD of each",
        weakness="blind to size: a small and noisy gradient has the highest effective rank",
    ),
    Method(
        name="module-types",
        summary="one rank for all layers of a module type, in proportion to the weights you give",
        planner="module-types", allocator="grouped", **_BEFORE,
        options={"weights": "{suffix or regular expression: weight}; 1 where none is given", **_PLACED},
        source="highest averages (D'Hondt) over module types",
        cost="none",
        weakness="which type matters depends on the task; depth is ignored",
    ),
    Method(
        name="manual",
        summary="the ranks you give, by layer name",
        planner="manual", allocator="uniform", **_BEFORE,
        options={
            "rank_pattern": "{suffix or regular expression: rank}, as PEFT's; others have the peak rank", **_PLACED,
        },
        source="PEFT's rank_pattern",
        cost="none",
        weakness="as good as the guess",
    ),
    Method(
        name="bottleneck",
        summary="no LoRA: bottlenecks of equal size behind attention and feed-forward layers, as a baseline",
        allocator="uniform", **(_BEFORE | {"init": "bottleneck"}),
        options={
            "after": "the layers they stand behind: houlsby (both kinds), pfeiffer (feed-forward alone), or a list of "
            "names or endings (houlsby)",
        },
        source="Houlsby et al., ICML 2019, arXiv 1902.00751; Pfeiffer et al., EACL 2021, arXiv 2005.00247",
        cost="two small products behind each such layer, in serving too",
        weakness="cannot be merged, exported, shrunk or composed; no other tool reads it",
    ),
)
