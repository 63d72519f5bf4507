"""A model of an embedding, a convolution of every kind, and a linear layer."""

from __future__ import annotations

import torch
from torch import nn

import rankalloc as ra

CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "groups, dilated, circular": lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2, padding_mode="circular"),
    "1d": lambda: nn.Conv1d(4, 6, 3, padding="same"),
    "3d": lambda: nn.Conv3d(4, 6, 2, groups=2),
}


class Tower(nn.Module):
    """Tokens into a map, one layer under test over it, and a linear layer at the end."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 32, padding_idx=0)
        self.layer = layer
        self.out = nn.LazyLinear(5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        dimensions = self.layer.weight.dim() - 2
        x = self.embedding(ids).reshape(len(ids), 4, *{1: (24,), 2: (6, 4), 3: (4, 3, 2)}[dimensions])
        return self.out(torch.tanh(self.layer(x)).flatten(1))


def ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 11, (5, 3), generator=torch.Generator().manual_seed(seed))


def make(kind: str = "plain") -> Tower:
    torch.manual_seed(0)
    model = Tower(CONVOLUTIONS[kind]())
    model(ids())
    return model.eval()


def adapt(kind: str, rank: int = 3, **options):
    model = make(kind)
    return model, ra.attach(model, rank=rank, target_modules=["embedding", "layer", "out"], **options)
