"""What torchrun starts in tests/test_distributed.py: one process of a run, or with WORLD_SIZE unset the whole of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import rankalloc as ra

from ..conftest import make_bert, make_mlp, make_trainer

STEPS, ROWS = 20, 12
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def plain_loop(method: str) -> dict[str, torch.Tensor]:
    """A loop of one's own under DDP; each process sees its part of the same global batch."""
    model = make_mlp(depth=4)
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=4, ranks={"2": 0}, init=ra.METHODS[method].init)
    wrapped = DistributedDataParallel(model) if WORLD > 1 else model
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=4, every=2), STEPS, method, seed=3)
    for step in range(STEPS):
        x = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(step))
        mine = x.chunk(WORLD)[RANK]
        F.mse_loss(wrapped(mine), mine[:, :8].sin() + mine[:, 8:].cos()).backward()
        controller.observe()
        optimizer.step()
        controller.update(optimizer)
        optimizer.zero_grad()
    controller.finish()
    return model.state_dict()


def trainer(folder: Path) -> dict[str, torch.Tensor]:
    """The Trainer, which wraps the model by itself."""
    model = make_bert()
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=4)
    callback = ra.RankCallback(adapters, ra.RankBudget(fraction=0.4, every=2))
    settings = {"per_device_train_batch_size": 8 // WORLD, "max_grad_norm": 1.0, "gradient_accumulation_steps": 2}
    # one process and two draw another random order; and averaging tokens, the Trainer doubles this model's loss
    settings |= {"train_sampling_strategy": "sequential", "average_tokens_across_devices": False}
    make_trainer(model, folder / "trainer", [callback], steps=STEPS, **settings).train()
    return model.state_dict()


def disagreement() -> None:
    """Gradients that nobody averages: an error in every process, and no hang."""
    model = make_mlp()
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=4)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-1)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=4, every=2), STEPS)
    for step in range(STEPS):
        model(torch.randn(4, 16, generator=torch.Generator().manual_seed(step + 1000 * RANK))).square().sum().backward()
        controller.observe()
        optimizer.step()
        controller.update(optimizer)
        optimizer.zero_grad()


def main(folder: Path) -> None:
    if WORLD > 1:
        dist.init_process_group("gloo")
    for method in ("auto", "adalora", "dylora"):
        torch.save(plain_loop(method), folder / f"{method}-{WORLD}-{RANK}.pt")
    if WORLD > 1:
        try:
            disagreement()
        except ra.RankallocError as error:
            (folder / f"disagreement-{RANK}.txt").write_text(str(error))
    torch.save(trainer(folder), folder / f"trainer-{WORLD}-{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
