"""The arms that an audit sets beside a method, by name: plain data, so that no torch checks a configuration."""

from __future__ import annotations

UNIFORM = "uniform"
"""The arm that the method has to beat."""

ARM_NAMES: dict[str, str] = {
    UNIFORM: "tuned uniform LoRA",
    "twin": "the method's own parametrisation and schedule with equal ranks",
    "random": "the method with ranks drawn by chance",
    "shuffled": "the method with its ranks handed to other layers",
    "post": "uniform LoRA of a higher rank, cut to the size after training",
    "cont": "uniform LoRA of a higher rank, cut, and trained on for the last quarter of the steps",
    "peft-adalora": "PEFT's AdaLoRA",
    "attention": "by hand: rank 1 in the attention's layers first",
    "mlp": "by hand: rank 1 in the MLPs' layers first",
    "first-blocks": "by hand: rank 1 in the first blocks",
    "last-blocks": "by hand: rank 1 in the last blocks",
}
"""{arm: what it is}."""

BY_HAND = ("attention", "mlp", "first-blocks", "last-blocks")
"""Patterns that someone writes in a line; they are compared where the size is below one rank a layer."""
