"""The largest singular triplets of a matrix that is held whole.

    small (shorter side at most 768)    exact: eigenvectors U of ΔΔᵀ in float64, σ² its eigenvalues, Σ^½Vᵀ = Σ^-½UᵀΔ
    large                               randomised range finder with power iterations (Halko, Martinsson and Tropp,
                                        2011, arXiv 0909.4061; torch.svd_lowrank), checked, else exact

The check: for a computed triplet, Δᵀu = σv holds by construction and Δv = σu + e with e outside of what was found. One
more half iteration would gain Σ‖e_i‖² of energy, so that is what the answer is still short of (to first order); at most
1e-4 of the energy found is accepted. A spectrum that falls slowly, one of noise, fails it and is done exactly.

Cost: O(d_in d_out r) a pass, or O(min(d)² max(d)) exact; memory of a few copies of the matrix. Weakness: ΔΔᵀ squares,
so singular values below about 1e-8 of the largest are lost; the difference of two bfloat16 weights has none so small.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

_SMALL = 768
_OVERSAMPLED = 16
_ITERATIONS = 3
_SHORT = 1e-4
_COLUMNS = 1 << 20  # numbers brought to float64 at a time
_NOTHING = 1e-7  # of the largest singular value: rounding of float32


@dataclass(frozen=True)
class Triplets:
    """The largest triplets of Δ (d_out, d_in) as B A with B (d_out, r), A (r, d_in), float32, in balanced scale:
    column i of B and row i of A both have size √σ_i.

    Attributes:
        sigma: falling, (r,) float64; what is zero up to rounding is left out, so r may be less than was asked.
        norm: ‖Δ‖_F.
        exact: whether they were computed exactly.
    """

    A: torch.Tensor
    B: torch.Tensor
    sigma: torch.Tensor
    norm: float
    exact: bool


@torch.no_grad()
def largest(delta: torch.Tensor, rank: int, name: str = "") -> Triplets:
    """The ``rank`` largest triplets of ``delta``, (d_out, d_in) float32.

    ``name`` seeds the random directions, so that equal matrices of equal names give equal bytes; torch's own generator
    is left as it was.

    Raises:
        ValueError: an entry is not finite.
    """
    if not torch.isfinite(delta).all():
        raise ValueError("not finite")
    norm = torch.linalg.vector_norm(delta, dtype=torch.float64).item()
    rank = min(rank, *delta.shape)
    exact = min(delta.shape) <= max(_SMALL, 4 * (rank + _OVERSAMPLED))
    if norm == 0 or rank == 0:
        empty = torch.zeros(0, dtype=torch.float64)
        return Triplets(delta.new_zeros(0, delta.shape[1]), delta.new_zeros(delta.shape[0], 0), empty, norm, True)
    found = None if exact else _randomised(delta / norm, rank, name)
    u, sigma, a = _exact(delta, rank) if found is None else (found[0], found[1] * norm, found[2] * norm)
    used = sigma > sigma[0] * _NOTHING
    u, sigma, a = u[:, used], sigma[used], a[used]
    sign = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))  # equal weights give equal factors
    size = sigma.sqrt().to(u.dtype)
    a, b = (a * sign.T / size[:, None]).float(), (u * sign * size).float()
    return Triplets(a, b, sigma.double(), norm, found is None)


def _exact(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U (d_out, r), σ (r,), ΣVᵀ (r, d_in)); in float64 but for a few columns at a time."""
    if delta.shape[0] > delta.shape[1]:
        v, sigma, right = _exact(delta.T, rank)
        safe = sigma.clamp_min(sigma[0] * 1e-14)
        return (right / safe[:, None]).T, sigma, v.T * sigma[:, None]
    rows = delta.shape[0]
    step = max(1, _COLUMNS // rows)
    gram = torch.zeros(rows, rows, dtype=torch.float64)
    for part in delta.split(step, dim=1):
        wide = part.double()
        gram.addmm_(wide, wide.T)
    values, vectors = torch.linalg.eigh(gram)
    u = vectors[:, -rank:].flip(1)
    sigma = values[-rank:].flip(0).clamp_min(0).sqrt()
    return u, sigma, torch.cat([u.T @ part.double() for part in delta.split(step, dim=1)], dim=1)


def _randomised(delta: torch.Tensor, rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """As :func:`_exact`, for a matrix of norm 1; None when the answer does not stand the check."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode("utf-8", "surrogatepass")))
        u, sigma, v = torch.svd_lowrank(delta, q=rank + _OVERSAMPLED, niter=_ITERATIONS)
    u, sigma, v = u[:, :rank], sigma[:rank], v[:, :rank]
    missed = (delta @ v - u * sigma).double().square().sum()
    if not missed <= _SHORT * sigma.double().square().sum():
        return None
    return u, sigma, v.T * sigma[:, None]
