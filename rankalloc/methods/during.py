"""Methods that choose ranks while they train."""

from __future__ import annotations

from .base import SHARED, Method

_BETA = {"beta": "decay of the moving average (0.85)"}
_BETAS = {
    "beta1": "decay of the averaged sensitivity (0.85)", "beta2": "decay of the averaged uncertainty (0.85)"
}
_ORDER = {
    "score_after_step": "score after the optimizer's step with the gradient from before it, as PEFT does; the paper "
    "scores before it (False)"
}
_PLACED = {"placement": SHARED["placement"]}
_SMALL = "r numbers a layer in score state; QR and a small SVD at each allocation"

DURING = (
    Method(
        name="auto",
        summary="the default: singular values weighted by the loss's pull at them; what is cut leaves memory at once",
        score="weighted-energy", shrinks="events", options={**_BETA, **SHARED},
        source="chosen by studies/planted and studies/default",
        cost="r numbers a layer in score state; QR and a small SVD at each allocation; memory falls with the budget",
        weakness="what is cut does not come back",
    ),
    Method(
        name="adalora",
        summary="sensitivity × uncertainty of each singular triplet, global top-k on a shrinking budget",
        score="sensitivity", canonical=False, options={**_BETAS, **_ORDER, **SHARED},
        source="Zhang et al., ICLR 2023, arXiv 2303.10512",
        cost="2 × the adapter in score state, about six foreach passes over it a step",
        weakness="its scores depend on the basis P and Q happen to be in, and learning starts slowly from Λ = 0",
    ),
    Method(
        name="singular-value",
        summary="cut the smallest singular values of all updates, in canonical form",
        score="energy", shrinks="events", options=SHARED,
        source="Eckart and Young, 1936, at every allocation of a training run",
        cost="no score state; QR and a small SVD at each allocation",
        weakness="sees only ΔW, not its effect on the loss",
    ),
    Method(
        name="first-order",
        summary="|λ ∂L/∂λ|: the first-order change of the loss when a triplet is taken away",
        score="first-order", options={**_BETA, **SHARED},
        source="Molchanov et al., CVPR 2019, arXiv 1906.10771, on triplets",
        cost=_SMALL, weakness="at a minimum the gradient vanishes, and with it the score",
    ),
    Method(
        name="fisher",
        summary="½ λ² E[(∂L/∂λ)²]: the second-order change, with the empirical Fisher information",
        score="fisher", options={**_BETA, **SHARED},
        source="LeCun et al., 1989; Theis et al., arXiv 1801.05787",
        cost=_SMALL, weakness="gradients of large batches underrate the information of single examples",
    ),
    Method(
        name="signal-to-noise",
        summary="sensitivity divided by its uncertainty",
        score="signal-to-noise", canonical=False, options={**_BETAS, **SHARED},
        source="IGU-LoRA, arXiv 2603.13792, without its path integral",
        cost="2 × the adapter in score state, about seven foreach passes over it a step",
        weakness="a triplet that is steadily unimportant has a high ratio too",
    ),
    Method(
        name="gradient-norm",
        summary="|∂L/∂λ|: how strongly the loss pulls at a triplet, whatever its size",
        score="gradient-norm", options={**_BETA, **SHARED},
        source="the gradient of ΔW along the triplet; compare FIM-LoRA, arXiv 2605.16800",
        cost=_SMALL, weakness="a direction that is already learned no longer pulls, and looks worthless",
    ),
    Method(
        name="magnitude",
        summary="|λ| ‖P‖ ‖Q‖ of each triplet, in whatever basis training left it",
        score="magnitude", canonical=False, options=SHARED,
        source="magnitude pruning, Han et al., NeurIPS 2015, on triplets",
        cost="no score state", weakness="two large triplets may cancel, and size is not importance",
    ),
    Method(
        name="sora",
        summary="gates between the factors that a proximal step drives to zero, its threshold meeting the budget",
        score="gate", rule="sora", init="gate", canonical=False, orthogonal=0.0,
        options={"threshold": "of the proximal step between allocations (0.001)", **_PLACED},
        source="Ding et al., EMNLP 2023, arXiv 2311.11696",
        cost="no score state; one pass over r numbers a layer a step",
        weakness="shrinks the gates that stay too, and gates ignore the sizes of P and Q",
    ),
    Method(
        name="l1ra",
        summary="an L1 penalty closes gates; the ranks it frees go where all gates are open",
        score="gate", rule="l1ra", allocator="ordered", init="gate", canonical=False, orthogonal=0.0,
        options={"weight": "of the L1 penalty (0.001)", **_PLACED},
        source="Singh et al., 2025, arXiv 2509.04884",
        cost="no score state; the peak rank's memory from the start",
        weakness="nothing moves until a gate has closed: short runs stay where they began",
    ),
    Method(
        name="elalora",
        summary="the budget from the first step; each round ranks move from the lowest to the highest scores",
        score="sensitivity", rule="elalora", allocator="ordered", canonical=False,
        options={
            "move": "share of the ranks that moves in the first round (0.2)",
            "per_layer": "ranks that may leave, or come to, one layer in a round (2)", **_BETAS, **SHARED,
        },
        source="Chang et al., 2025, arXiv 2504.00254",
        cost="2 × the adapter in score state; the peak rank's memory from the start",
        weakness="a fresh triplet has one round to earn its score",
    ),
    Method(
        name="increlora",
        summary="one rank a layer at first, then growth where scores are highest, up to the budget",
        score="sensitivity", rule="increlora", allocator="ordered", canonical=False,
        options={**_BETAS, **SHARED},
        source="Zhang et al., 2023, arXiv 2308.12043",
        cost="2 × the adapter in score state; the peak rank's memory from the start",
        weakness="what is added late has few steps to learn in, and nothing is taken back",
    ),
    Method(
        name="dylora",
        summary="nested ranks: each step trains a random number of leading triplets, so every rank works afterwards",
        score="magnitude", rule="dylora", init="lora", canonical=False, orthogonal=0.0,
        options={"frozen": "train only the last of the triplets drawn (False)", **_PLACED},
        source="Valipour et al., EACL 2023, arXiv 2210.07558",
        cost="no score state; a copy of the adapter during each optimizer step",
        weakness="late triplets learn in few of the steps",
    ),
    Method(
        name="matryoshka",
        summary="nested ranks: fixed scales that fall along the triplets, so every rank works afterwards",
        score="magnitude", rule="matryoshka", init="lora", canonical=False, orthogonal=0.0,
        options={"weights": "of the ranks that are mixed: one, inverse or root (root)", **_PLACED},
        source="Modoranu et al., 2026, arXiv 2605.07850",
        cost="none",
        weakness="no step looks at a cut adapter: low ranks are far from what they could be",
    ),
)
