"""Principal components of rows that arrive in pieces (Ross et al., IJCV 2008), for EVA.

State: k singular values and k components, the mean and the squared deviations of every column. A new piece is stacked
under the components scaled by their singular values, with one row for the shift of the mean, and the stack is
decomposed again.
"""

from __future__ import annotations

import torch

# the seed that PEFT fixes for its randomised SVD, so that the same batches give the same ranks in both
_SKETCH_SEED = 42
_ITERATIONS = 4


class IncrementalPCA:
    """The leading components of all rows taken in so far.

    Args:
        count: components kept, k.
        tau: cosine between a component and itself one piece earlier from which it has converged.

    Attributes:
        components: (k, d), orthonormal rows; None before the first piece.
        ratios: (k,) share of the total variance that each explains, falling; None before the first piece.
        converged: (k,) bool.
    """

    def __init__(self, count: int, tau: float) -> None:
        self.count, self.tau = count, tau
        self.components: torch.Tensor | None = None
        self.ratios: torch.Tensor | None = None
        self.converged = torch.zeros(count, dtype=torch.bool)
        self.singular_values: torch.Tensor | None = None
        self.rows = 0
        self.mean: torch.Tensor | None = None
        self.scatter: torch.Tensor | None = None

    def leading(self, count: int) -> torch.Tensor:
        """The first ``count`` components, (count, d); there must have been a piece."""
        assert self.components is not None
        return self.components[:count]

    def take_in(self, rows: torch.Tensor) -> None:
        """Add a piece (n, d); a piece with fewer rows than components is ignored."""
        # Apple's GPUs have no double precision
        rows = rows.detach().to("cpu" if rows.device.type == "mps" else rows.device, torch.float32)
        if len(rows) < self.count:
            return
        exact = rows.double()
        mean = exact.mean(0)
        scatter = (exact - mean).square().sum(0)
        if self.components is None or self.singular_values is None or self.mean is None or self.scatter is None:
            block = rows - mean.float()
            self.mean, self.scatter, self.rows = mean, scatter, len(rows)
        else:
            together = self.rows + len(rows)
            shift = (self.rows * len(rows) / together) ** 0.5 * (self.mean - mean)
            scaled = self.singular_values[:, None] * self.components
            block = torch.cat([scaled.double(), exact - mean, shift[None]])
            self.mean = (self.mean * self.rows + mean * len(rows)) / together
            self.scatter, self.rows = self.scatter + scatter + shift.square(), together
        values, components = _leading(block, self.count)
        if self.components is not None:
            cosine = torch.nn.functional.cosine_similarity(components, self.components.to(components.dtype))
            self.converged = (cosine >= self.tau).cpu()
        self.singular_values, self.components = values, components
        total = self.scatter.sum()
        self.ratios = (values.double().square() / total).to(values.dtype) if total > 0 else torch.zeros_like(values)


def _leading(block: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest singular values and right singular vectors (count, d), each with its largest entry
    positive, so that a vector and its successor can be compared."""
    # seeds the CPU's generator and the device's; the caller has forked both
    torch.manual_seed(_SKETCH_SEED)
    _, values, vectors = torch.svd_lowrank(block, q=min(2 * count, *block.shape), niter=_ITERATIONS)
    components = vectors.T[:count]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return values[:count], components * torch.where(largest < 0, -1.0, 1.0).to(components.dtype)
