"""Problems with a known answer: a frozen network, and a teacher that adds updates of known rank to it.

The student adapts the frozen network to the teacher's outputs. Layer by layer one can then see
whether an allocation is right, which no real task allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

RANKS = (0, 1, 2, 3, 4, 6, 8)
AHEAD = 16
VARIANTS: dict[str, dict] = {
    "main": {},
    "half": {"spectrum": "decaying"},
    "decaying": {"spectrum": "decaying"},
    "correlated": {"correlated": True},
    "noise": {"noise": 0.1},
}
"""{name: arguments of :func:`plant`}. The budget is the planted total, for "half" half of that."""


class Mlp(nn.Module):
    """Residual blocks x + down(gelu(up(x))): 16 linear layers."""

    def __init__(self, width: int = 48, hidden: int = 64, blocks: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, hidden), "down": nn.Linear(hidden, width)}) for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["down"](F.gelu(block["up"](F.layer_norm(x, x.shape[-1:]))))
        return x


class Transformer(nn.Module):
    """Pre-norm attention and MLP blocks on sequences of vectors: 18 linear layers."""

    def __init__(self, width: int = 48, hidden: int = 96, blocks: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        shapes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width),
                  "up": (width, hidden), "down": (hidden, width)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()}) for _ in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        for block in self.blocks:
            y = F.layer_norm(x, (width,))
            q, k, v = (block[n](y).view(rows, length, self.heads, -1).transpose(1, 2) for n in ("q", "k", "v"))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, length, width)
            x = x + block["o"](mixed)
            x = x + block["down"](F.gelu(block["up"](F.layer_norm(x, (width,)))))
        return x


ARCHITECTURES = {"mlp": Mlp, "transformer": Transformer}


@dataclass
class Problem:
    """``base`` and ``teacher`` have the same layers; ``ranks`` are those of teacher − base."""

    base: nn.Module
    teacher: nn.Module
    ranks: dict[str, int]
    mixing: torch.Tensor
    noise: float
    architecture: str

    def batches(self, generator: torch.Generator, count: int, size: int = 64) -> Iterator[tuple[torch.Tensor, ...]]:
        """``count`` fresh batches: inputs and the teacher's outputs, with label noise where the variant has it.

        For the transformer ``size`` / 4 sequences of 8 vectors. The teacher answers 16 batches at a time, which
        costs little more than answering one.
        """
        rows = size if self.architecture == "mlp" else size // 4
        for start in range(0, count, AHEAD):
            x = self._inputs(generator, rows * AHEAD)
            with torch.no_grad():
                y = self.teacher(x)
                if self.noise:
                    y = y + self.noise * self._scale * torch.randn(y.shape, generator=generator)
            yield from list(zip(x.split(rows), y.split(rows), strict=True))[: count - start]

    def _inputs(self, generator: torch.Generator | None, rows: int) -> torch.Tensor:
        shape = (rows, 48) if self.architecture == "mlp" else (rows, 8, 48)
        return torch.randn(shape, generator=generator) @ self.mixing

    @torch.no_grad()
    def relative_error(self, student: nn.Module) -> float:
        """E‖student − teacher‖² / E‖base − teacher‖² on fresh inputs, without label noise."""
        x = self._inputs(torch.Generator().manual_seed(987), 512 if self.architecture == "mlp" else 128)
        y = self.teacher(x)
        return float((student(x) - y).square().sum() / (self.base(x) - y).square().sum())

    def __post_init__(self) -> None:
        x = self._inputs(None, 256 if self.architecture == "mlp" else 64)
        with torch.no_grad():
            self._scale = float((self.teacher(x) - self.base(x)).std())


def plant(
    architecture: str, seed: int, spectrum: str = "equal", correlated: bool = False, noise: float = 0.0
) -> Problem:
    """Draw a problem.

    Args:
        spectrum: "equal": every planted singular value is the same; "decaying": 1, 1/2, 1/4, ... of it.
        correlated: inputs whose covariance has a decaying spectrum (condition number 100).
        noise: standard deviation of the label noise, in units of the teacher's own change.
    """
    torch.manual_seed(seed)
    base, teacher = ARCHITECTURES[architecture](), ARCHITECTURES[architecture]()
    teacher.load_state_dict(base.state_dict())
    ranks = {}
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    drawn = torch.randint(0, len(RANKS), (len(names),)).tolist()
    for name, index in zip(names, drawn, strict=True):
        rank = ranks[name] = RANKS[index]
        weight = teacher.get_submodule(name).weight
        u = torch.linalg.qr(torch.randn(weight.shape[0], max(rank, 1))).Q[:, :rank]
        v = torch.linalg.qr(torch.randn(weight.shape[1], max(rank, 1))).Q[:, :rank]
        values = torch.ones(rank) if spectrum == "equal" else 0.5 ** torch.arange(rank)
        with torch.no_grad():
            weight += (u * values) @ v.T
    mixing = torch.eye(48)
    if correlated:
        rotation = torch.linalg.qr(torch.randn(48, 48)).Q
        mixing = rotation * torch.logspace(0, -1, 48)  # standard deviations from 1 to 0.1
        mixing = mixing * (48 / mixing.square().sum()).sqrt()
    return Problem(base.requires_grad_(False), teacher.requires_grad_(False), ranks, mixing, noise, architecture)
