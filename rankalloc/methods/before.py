"""Methods that choose ranks before training: adapters begin, and end, with them."""

from __future__ import annotations

from .base import Method

BEFORE = (
    Method(
        name="uniform",
        summary="plain LoRA with equal ranks everywhere that spend the same budget: the control",
        score=None, allocator="uniform", when="before", init="lora", canonical=False, orthogonal=0.0,
        source="Hu et al., ICLR 2022, arXiv 2106.09685",
        cost="none",
        weakness="gives a layer that needs nothing as much as one that needs most",
    ),
)
