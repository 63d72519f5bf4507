"""TIES and DARE on whole updates, with PEFT's own functions, reduced to low rank again.

TIES (Yadav et al., 2023, arXiv 2306.01708) keeps the largest entries of each update and adds those that agree in
sign; DARE (Yu et al., 2024, arXiv 2311.03099) drops random entries and scales up the rest. Both work on the entries of
ΔW, so each layer's ΔW is formed, one layer at a time, as PEFT's ``ties_svd`` and ``dare_*_svd`` do.

Cost: an SVD of each d_out × d_in matrix, randomised above 1,024 (Halko et al., 2011, arXiv 0909.4061), and one matrix
in memory for each adapter. Known weakness: the result has full rank; triplets beyond ``most`` are lost, and counted as
error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import ConfigError
from ..lowrank import Factors
from ..options import choice, number

Combine = Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]
"""Turns the updates of one layer and their weights into one update."""
COMBINATIONS = ("sum", "ties", "dare_linear", "dare_ties")


def combiner(name: str, density: float) -> Combine:
    """PEFT's function of that name, with ``density`` (the share of entries to keep) filled in.

    Raises:
        ConfigError: there is no such combination, the density is not in (0, 1), or PEFT is not installed.
    """
    choice("combination", name, COMBINATIONS)
    density = number("density", density, 0, 1, ends=False)
    try:
        from peft.utils import merge_utils
    except ImportError:
        raise ConfigError(f"combination {name!r} needs PEFT; install it (pip install 'rankalloc[peft]')") from None
    function = getattr(merge_utils, name)
    return lambda updates, weights: function(list(updates), weights, density)


def merged(
    parts: Sequence[Factors], weights: Sequence[float], combine: Combine, most: int, seed: int
) -> tuple[Factors, float]:
    """The ``most`` largest triplets of the combined update, and ‖rest‖_F; ``seed`` is for DARE's random entries."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = combine([part.dense().float() for part in parts], torch.tensor(list(weights)))
        most = min(most, *whole.shape)
        if min(whole.shape) <= 1024:
            u, sigma, vh = torch.linalg.svd(whole.double(), full_matrices=False)
        else:
            u, sigma, v = torch.svd_lowrank(whole, q=min(most + 16, *whole.shape), niter=4)
            vh = v.T
    factors = Factors(u[:, :most].float(), vh[:most].float(), sigma[:most].double())
    rest = float(whole.double().square().sum() - sigma[:most].double().square().sum())
    return factors, max(0.0, rest) ** 0.5
