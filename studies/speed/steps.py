"""Step times: beside the floor and PEFT, after the freeze, and as layers, width and rank grow."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

import rankalloc as ra

from . import arms
from .arms import ADAPTER, DEFAULT, EVERY, FLOOR, PEFT_ADALORA, PEFT_LORA, PLAIN, PRUNED, Arm, alternate, ratio

ALL = (FLOOR, PEFT_LORA, PEFT_ADALORA, PLAIN, PRUNED, ADAPTER, DEFAULT)


def beside_peers(
    make: Callable[[], torch.nn.Module], batch: dict, targets: str, rank: int, rounds: int, steps: int = 2,
    kinds: tuple[str, ...] = ALL,
) -> dict[str, Any]:
    """Mean seconds a step of every arm at equal rank, by round, and the ratios between them.

    The default method's seconds include its share of an allocation: the median one divided by the steps between two.
    PEFT's masks, which are set as rarely, fall into few rounds and so hardly count in the median.
    """
    made = [Arm(kind, make(), targets, rank) for kind in kinds]
    times = dict(zip(kinds, alternate(made, rounds, steps, lambda arm: arm.step(batch)), strict=True))
    share = statistics.median(made[kinds.index(DEFAULT)].allocations) / EVERY
    times[DEFAULT] = [seconds + share for seconds in times[DEFAULT]]
    compared = [(ADAPTER, FLOOR), (DEFAULT, FLOOR), (DEFAULT, PEFT_LORA), (DEFAULT, PEFT_ADALORA), (ADAPTER, PLAIN)]
    compared += [(PEFT_LORA, FLOOR), (PEFT_ADALORA, FLOOR), (PRUNED, FLOOR), (DEFAULT, PRUNED)]
    return {
        "rank": rank, "rounds": rounds, "steps": steps, "seconds": times, "allocation a step": share,
        "ratios": {f"{a} / {b}": ratio(times[a], times[b]) for a, b in compared if a in times and b in times},
    }


def after_the_freeze(rank: int, rounds: int, steps: int = 10) -> dict[str, Any]:
    """A run that shrank to a third of its ranks beside one that began with what is left."""
    batch = arms.bert_batch()
    budget = ra.RankBudget(ranks=6 * arms.BERT_LAYERS * rank // 3, warmup=0.0, freeze=0.5, every=1)
    shrunk = Arm(DEFAULT, arms.bert(), arms.BERT_TARGETS, rank, total_steps=8, budget=budget)
    for _ in range(5):
        shrunk.step(batch)
    ranks = shrunk.adapters.ranks()
    born = Arm(ADAPTER, arms.bert(), arms.BERT_TARGETS, rank)
    ra.detach(born.adapters)
    born.adapters = ra.attach(born.model, ranks=ranks, target_modules=arms.BERT_TARGETS, modules_to_save=())
    born.optimizer = torch.optim.AdamW(born.adapters.parameters(), lr=1e-3, fused=True)
    times = alternate([shrunk, born], rounds, steps, lambda arm: arm.step(batch))
    sizes = {name: arm_bytes(arm) for name, arm in (("shrunk", shrunk), ("born", born))}
    return {
        "rank": rank, "final ranks": sum(ranks.values()), "seconds": {"shrunk": times[0], "born": times[1]},
        "ratio": ratio(*times), "bytes": sizes,
    }


def growth(rounds: int, steps: int = 2) -> list[dict[str, Any]]:
    """Ratios to the floor of PEFT LoRA and the default method as one of layers, width and rank changes."""
    points = [("layers", n, dict(layers=n), 12) for n in (2, 6, 12)]
    points += [("width", w, dict(width=w, layers=3), 12) for w in (192, 384, 768)]
    points += [("rank", r, dict(layers=3), r) for r in (4, 12, 48)]
    found = []
    for what, value, shape, rank in points:
        result = beside_peers(
            lambda shape=shape: arms.bert(**shape), arms.bert_batch(), arms.BERT_TARGETS, rank, rounds, steps,
            (FLOOR, PEFT_LORA, DEFAULT),
        )
        found.append({"what": what, "value": value, "ratios": result["ratios"]})
    return found


def arm_bytes(arm: Arm) -> dict[str, int]:
    """Bytes of an arm's adapter parameters, gradients, optimizer state and allocator state, as they are now."""
    trained = [p for p in arm.model.parameters() if p.requires_grad]
    state = arm.optimizer.state
    optimizer = [t for p in trained for t in state.get(p, {}).values() if isinstance(t, torch.Tensor)]
    allocator: list[torch.Tensor] = []
    if arm.controller is not None and arm.controller.state.score is not None:
        allocator = list(arm.controller.state.score.tensors().values())
    elif arm.kind == PEFT_ADALORA:
        peft = arm.model.base_model.rankallocator
        allocator = [t for kept in (peft.ipt, peft.exp_avg_ipt, peft.exp_avg_unc) for t in kept.values()]

    def size(tensors: list[torch.Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    own = size(trained)
    return {"adapter": own, "gradient": own, "optimizer": size(optimizer), "allocator": size(allocator)}
