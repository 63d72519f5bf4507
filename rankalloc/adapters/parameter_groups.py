"""Parameter groups: LoRA+'s two learning rates, and no weight decay where it does harm.

Hayou et al., ICML 2024 (arXiv 2402.12354): in a wide layer both factors of B A learn their features at an equal pace
only when B's rate is the larger one, by a constant; 16 was good in their runs. Here

    P and Λ (and "vera"'s output scale, "lora-xs"'s core)     plus_ratio · lr
    Q, and the task heads                                     lr

Λ goes with P because P Λ is the B of the exported file: in every parametrisation that trains it, the product that
begins at zero, or next to it, holds Λ. A ratio other than 1 wants a lower lr than plain LoRA's best.

Λ, the output scale, and every vector of a head (biases, norms) are without weight decay: decay on Λ would shrink
singular values that the allocation compares, on top of what P and Q lose.

With transformers' Trainer, the optimizer is made first and its schedule is the Trainer's:

    optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=2e-3, plus_ratio=16))
    trainer = Trainer(model, args, ..., optimizers=(optimizer, None), callbacks=[ra.RankCallback(adapters, budget)])

In a configuration, ``training: {plus_ratio: 16}`` says the same.

Cost: none. Known weakness: the best ratio depends on the task, and a rate searched for without it says nothing with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..options import number
from .triplets import Triplets


def parameter_groups(
    adapters: Iterable[Triplets], heads: Mapping[str, nn.Module], lr: float, plus_ratio: float = 16.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Everything that trains, as groups for a torch optimizer; the formula is in the module docstring.

    Args:
        adapters, heads: what trains; usually called as ``adapters.parameter_groups(lr)``.
        lr: rate of Q and of the heads.
        plus_ratio: rate of P, Λ and the core, in multiples of ``lr``; 1 for plain LoRA.
        weight_decay: of matrices; vectors have none.

    Returns:
        Dictionaries with "params", "lr", "weight_decay" and "name", without empty ones.

    Raises:
        ConfigError: a number is out of its range.

    Example:
        >>> import torch, rankalloc as ra
        >>> adapters = ra.attach(torch.nn.Sequential(torch.nn.Linear(8, 4)), rank=2)
        >>> optimizer = torch.optim.AdamW(adapters.parameter_groups(lr=1e-3, plus_ratio=16))
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('P', 0.016), ('lam', 0.016), ('Q', 0.001)]
    """
    lr, plus_ratio = number("lr", lr), number("plus_ratio", plus_ratio, 0, ends=False)
    weight_decay = number("weight_decay", weight_decay)
    adapters = list(adapters)
    of_heads = [p for head in heads.values() for p in head.parameters()]
    groups: list[tuple[str, float, float, list[Any]]] = [
        ("P", plus_ratio * lr, weight_decay, [a.P for a in adapters]),
        ("lam", plus_ratio * lr, 0.0, [p for a in adapters for p in (a.lam, a.lam_out) if p is not None]),
        ("core", plus_ratio * lr, weight_decay, [a.core for a in adapters if a.core is not None]),
        ("Q", lr, weight_decay, [a.Q for a in adapters]),
        ("biases", lr, 0.0, [bias for a in adapters for bias in a.biases()]),
        ("heads", lr, weight_decay, [p for p in of_heads if p.dim() > 1]),
        ("heads' vectors", lr, 0.0, [p for p in of_heads if p.dim() <= 1]),
    ]
    return [
        {"params": trained, "lr": rate, "weight_decay": decay, "name": name}
        for name, rate, decay, members in groups if (trained := _trained(members))
    ]


def _trained(parameters: list[Any]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]
