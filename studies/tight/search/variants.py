"""What was tried: the rule that the search began from, and every change of it, in a line each.

"base" is the rule that ``auto`` had at the time: a warm-up of a tenth, no look-ahead. "look-ahead, warm-up 4" is what
was adopted; as the package's default it is a warm-up of a twentieth, which is 5 of 96 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rankalloc.budget import LayerShape
from rankalloc.experiments.audits.hand_patterns import filled
from rankalloc.layer_names import places

from ..arms import PEAK_RANK
from ..hand import HAND, QUERY_VALUE, STARTS, ranks_of
from .rules import Rule

BASE, ADOPTED = "base", "look-ahead, warm-up 4"
RATES, LORA_RATES = (7e-3, 1e-2, 1.4e-2), (5.6e-3, 8e-3, 1.1e-2, 1.6e-2)
"""Of P·Λ·Q and of B·A."""


@dataclass(frozen=True)
class Variant:
    """A rule, or a pattern by hand.

    Attributes:
        words: what it changes.
        changes: of :class:`Rule`; None for ranks that stay as they begin.
        rank: the peak rank.
        init: "svd" for P·Λ·Q, "lora" for B·A.
    """

    words: str
    changes: dict[str, Any] | None = field(default_factory=dict)
    rank: int = PEAK_RANK
    init: str = "svd"

    @property
    def rule(self) -> Rule | None:
        return None if self.changes is None else Rule(**self.changes)

    @property
    def rates(self) -> tuple[float, ...]:
        return RATES if self.init == "svd" else LORA_RATES


_AHEAD: dict[str, Any] = {"look_ahead": True, "warmup": 4}
_ENTRIES = "after a cut, entries of P and Q have RMS {}, at the same update: λ makes up for it"

VARIANTS: dict[str, Variant] = {
    BASE: Variant("the rule at the time: a warm-up of 10 of 96 steps, no look-ahead"),
    ADOPTED: Variant("adopted: look-ahead, and a warm-up of 4 steps", _AHEAD),
    "look-ahead": Variant("keeps what the last budget would keep by today's scores", {"look_ahead": True}),
    "warm-up 4": Variant("a warm-up of 4 steps", {"warmup": 4}),
    "warm-up 2": Variant("a warm-up of 2 steps", {"warmup": 2}),
    "warm-up 20": Variant("a warm-up of 20 steps", {"warmup": 20}),
    "freeze 20": Variant("ranks are final at step 20 of 96, not 58", {"freeze": 20}),
    "freeze 30": Variant("ranks are final at step 30", {"freeze": 30}),
    "freeze 42": Variant("ranks are final at step 42", {"freeze": 42}),
    "freeze 48": Variant("ranks are final at step 48", {"freeze": 48}),
    "freeze 66": Variant("ranks are final at step 66", {"freeze": 66}),
    "freeze 76": Variant("ranks are final at step 76", {"freeze": 76}),
    "exponent 2": Variant("the budget falls as a square, not a cube", {"exponent": 2}),
    "exponent 5": Variant("the budget falls as a fifth power", {"exponent": 5}),
    "linear": Variant("the budget falls evenly", {"exponent": 1}),
    "at once": Variant("the whole cut at step 14, adjusted until 58", {"exponent": 0}),
    "once at 20": Variant("one cut, at step 21", {"exponent": 0, "warmup": 20, "freeze": 21}),
    "once at 30": Variant("one cut, at step 31", {"exponent": 0, "warmup": 30, "freeze": 31}),
    "every 2": Variant("a cut every 2 steps, not 4", {"every": 2}),
    "every 8": Variant("a cut every 8 steps", {"every": 8}),
    "no spares": Variant("what is cut leaves memory at once", {"spares": 0}),
    "no spares, look-ahead": Variant("what is cut leaves memory at once; look-ahead", {
        "spares": 0, "look_ahead": True,
    }),
    "spares x 2": Variant("twice as many dropped triplets may grow back", {"spares": 2}),
    "cost ^ 0": Variant("layers are served by score, whatever a rank costs", {"cost_exponent": 0.0}),
    "cost ^ 0.5": Variant("by score / √cost", {"cost_exponent": 0.5}),
    "cost ^ 1.5": Variant("by score / cost^1.5", {"cost_exponent": 1.5}),
    "at most one": Variant("no layer keeps more than rank 1", {"cap": 1}),
    "energy": Variant("score σ²", {"score": "energy"}),
    "singular value": Variant("score σ", {"score": "size"}),
    "first-order": Variant("score |σ ∂L/∂σ|, averaged", {"score": "first-order"}),
    "signed first-order": Variant("score σ ∂L/∂σ, averaged with its sign", {"score": "signed first-order"}),
    "squared first-order": Variant("score (σ ∂L/∂σ)², averaged: the empirical Fisher information's", {
        "score": "squared first-order",
    }),
    "gradient norm": Variant("score |∂L/∂σ|, averaged", {"score": "gradient-norm"}),
    "layer first": Variant("a layer's first triplet has the summed score of all of them", {
        "score": "layer's weighted energy",
    }),
    "layer first, energy": Variant("a layer's first triplet has the summed σ² of all of them", {
        "score": "layer's energy",
    }),
    "layer first, first-order": Variant("a layer's first triplet has the summed |σ ∂L/∂σ| of all of them", {
        "score": "layer's first-order",
    }),
    "adopted, layer first": Variant("look-ahead, warm-up 4, layer first", {
        **_AHEAD, "score": "layer's weighted energy",
    }),
    "adopted, squared first-order": Variant("look-ahead, warm-up 4, squared first-order", {
        **_AHEAD, "score": "squared first-order",
    }),
    "rate of lambda x 3": Variant("λ learns 3 times as fast", {"speed": {"lam": 3.0}}),
    "rate of lambda x 10": Variant("λ learns 10 times as fast", {"speed": {"lam": 10.0}}),
    "rate of P, Q x 0.5": Variant("P and Q learn half as fast", {"speed": {"P": 0.5, "Q": 0.5}}),
    "rate of P x 2": Variant("P learns twice as fast", {"speed": {"P": 2.0}}),
    "rate of Q x 0.5": Variant("Q learns half as fast", {"speed": {"Q": 0.5}}),
    "entries 0.02": Variant(_ENTRIES.format(0.02), {"rms": 0.02}),
    "entries 0.04": Variant(_ENTRIES.format(0.04), {"rms": 0.04}),
    "entries 0.08": Variant(_ENTRIES.format(0.08), {"rms": 0.08}),
    "entries 0.15": Variant(_ENTRIES.format(0.15), {"rms": 0.15}),
    "start 0.01": Variant("P and Q begin at standard deviation 0.01, not 0.02", {"std": 0.01}),
    "start 0.04": Variant("P and Q begin at standard deviation 0.04", {"std": 0.04}),
    "new at 20": Variant("ranks are final at step 20, and new factors begin there", {"freeze": 20, "renew": True}),
    "new at 30": Variant("ranks are final at step 30, and new factors begin there", {"freeze": 30, "renew": True}),
    "new at 42": Variant("ranks are final at step 42, and new factors begin there", {"freeze": 42, "renew": True}),
    "once at 20, new": Variant("one cut, at step 20, and new factors there", {
        "warmup": 19, "freeze": 20, "renew": True,
    }),
}  # fmt: skip
_TO_OTHERS = (BASE, "freeze 20", "freeze 30", "once at 20", "cost ^ 0", "cost ^ 0.5", "energy", "first-order",
              "squared first-order", "new at 20")  # fmt: skip
VARIANTS |= {
    f"{name}, rank {rank}": Variant(f"{VARIANTS[name].words}; peak rank {rank}", VARIANTS[name].changes, rank)
    for rank, names in {1: _TO_OTHERS, 2: (BASE, "freeze 30"), 8: (BASE, "freeze 30")}.items() for name in names
}
VARIANTS |= {
    f"{name}, rank {rank}, as LoRA": Variant(
        f"{VARIANTS[name].words}; B·A in place of P·Λ·Q, peak rank {rank}", VARIANTS[name].changes, rank, "lora"
    )
    for rank, names in {1: _TO_OTHERS, 4: (BASE, "freeze 30", "cost ^ 0", "energy")}.items() for name in names
}
_ALL, AS_TRIPLETS = "all layers", ", as triplets"
BY_HAND = [*HAND, QUERY_VALUE, *(f"{_ALL}, {start} blocks" for start in STARTS)]
VARIANTS |= {
    f"{name}{way}": Variant("a pattern by hand" + words, None, 0, init)
    for init, way, words in (("lora", "", ", B·A"), ("svd", AS_TRIPLETS, ", P·Λ·Q")) for name in BY_HAND
}


def pattern(name: str, shapes: Sequence[LayerShape], params: int) -> dict[str, int]:
    """{layer: rank} of a variant that is a pattern by hand."""
    name = name.removesuffix(AS_TRIPLETS)
    if not name.startswith(_ALL):
        return ranks_of(name, shapes, params)
    placed = list(zip(shapes, places([shape.name for shape in shapes]), strict=True))
    order = STARTS[name.split(", ")[1].removesuffix(" blocks")](1 + max(block or 0 for _, (block, _) in placed))
    return filled([shape for block in order for shape, (at, _) in placed if at == block], shapes, params)
