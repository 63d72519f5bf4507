"""What torchrun starts for one test: DDP, and one of two processes that is killed between two allocations."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rankalloc as ra

RANK = int(os.environ["RANK"])


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    adapters = ra.attach(model, rank=4)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    controller = ra.RankController(adapters, ra.RankBudget(ranks=4, every=4), 20)
    for step in range(20):
        (folder / f"step-{RANK}").write_text(str(step))
        if step == 7 and RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        wrapped(torch.randn(4, 16)).square().sum().backward()
        controller.observe()
        optimizer.step()
        controller.update(optimizer)
        optimizer.zero_grad()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
