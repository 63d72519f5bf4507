"""The largest singular triplets of a matrix that is held whole.

    small (shorter side at most 512)    exact: eigenvectors U of ΔΔᵀ in float64, σ² its eigenvalues, ΣVᵀ = UᵀΔ
    large                               randomised block Krylov (Musco and Musco, 2015, arXiv 1504.05477, algorithm 2):
                                        the best triplets in span{ΔG, (ΔΔᵀ)ΔG, (ΔΔᵀ)²ΔG, …}, G Gaussian, with as many
                                        blocks as the check needs; exact where half of all directions seem too few

Products are float32, small matrices float64, and each block is made orthogonal to all before it, twice.

The check. Let U and Θ be the r Ritz vectors and values that are kept, θ the smallest of Θ, and ΔΔᵀU = UΘ + NS with
NᵀU = 0: N is the next block, and S falls out of making it orthogonal. If no direction orthogonal to U holds more
energy than θ, then ΔΔᵀ is at most [[Θ, Sᵀ], [S, θI]] in the basis (U, N, rest), and by Weyl's inequality the energy Σσ²
of the best r triplets is at most the sum of that matrix's r largest eigenvalues. An answer is taken when it holds
1 − 1e-3 of this sum, so that, under that condition,

    ‖Δ‖² − ‖Δ − BA‖² ≥ 0.999 Σ_{i ≤ r} σ_i²       (the sum is Eckart's and Young's optimum, 1936)

The condition itself rests on the random start, which is wider than r: a larger direction that is orthogonal to U and
does not show in S must be one to which all Gaussian columns were nearly orthogonal.

Cost: O(d_in d_out r) per block, 1 to 3 blocks for a clear low rank and about ten for pure noise; O(min(d)² max(d)) if
exact. Memory of a few copies of the matrix. Known weakness: singular values below about 1e-6 of the largest (1e-7 where
exact) are taken for rounding and left out; and in noise, where many directions are nearly equal, the energy is near the
best, but each triplet may be a mixture.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import scipy.linalg
import torch

_SMALL = 512
_ALL = 384  # sides up to which all eigenvectors are as soon had as a few
_OVERSAMPLED = 8
_MULTIPLE = 16  # columns that cost a matrix product no more than one
_BLOCKS = 4  # with room for fewer, the exact decomposition costs as little as a failed attempt
_SHORT = 1e-3
_TIMES = 6  # a block is orthogonalised at most this often, usually twice
_GIVEN_UP = 1.25  # give up when more than this share of the largest space seems to be needed
_COLUMNS = 1 << 20  # numbers converted to float64 at a time
_SUMMED = 1 << 15  # the same where each number is used once, so that a cache holds them
_NOTHING = 1e-7  # share of the largest singular value that is rounding of float32


@dataclass(frozen=True)
class Triplets:
    """The largest triplets of Δ (d_out, d_in) as B A with B (d_out, r), A (r, d_in), float32, in balanced scale:
    column i of B and row i of A both have size √σ_i.

    Attributes:
        sigma: falling, (r,) float64; values that are only rounding are left out, so r may be less than requested.
        norm: ‖Δ‖_F.
        exact: whether they were computed exactly; if not, Σσ² is at least 0.999 of the optimum.
    """

    A: torch.Tensor
    B: torch.Tensor
    sigma: torch.Tensor
    norm: float
    exact: bool


@torch.no_grad()
def largest(delta: torch.Tensor, rank: int, name: str = "") -> Triplets:
    """The ``rank`` largest triplets of ``delta``, (d_out, d_in) float32.

    ``name`` seeds the random directions, so equal matrices of equal names give equal bytes; torch's global generator is
    not used.

    Raises:
        ValueError: an entry is not finite.
    """
    norm = frobenius(delta)
    if not math.isfinite(norm):
        raise ValueError("not finite")
    rank = min(rank, *delta.shape)
    if norm == 0 or rank == 0:
        empty = torch.zeros(0, dtype=torch.float64)
        return Triplets(delta.new_zeros(0, delta.shape[1]), delta.new_zeros(delta.shape[0], 0), empty, norm, True)
    tall = delta.shape[0] > delta.shape[1]
    wide = delta.T if tall else delta
    found = _krylov(wide, rank, norm, name) if len(wide) > _SMALL else None
    u, sigma, right = found or _exact(wide, rank)
    used = sigma > sigma[0] * _NOTHING * (1 if found is None else 10)
    size = sigma[used].sqrt()
    a, b = right[used] / size[:, None], u[:, used] * size
    if tall:
        a, b = b.T, a.T
    sign = torch.sign(b.gather(0, b.abs().argmax(0, keepdim=True)))  # equal weights give equal factors
    return Triplets((a * sign.T).float(), (b * sign).float(), sigma[used], norm, found is None)


def frobenius(tensor: torch.Tensor) -> float:
    """‖tensor‖_F of float32, summed in float64; NaN or inf if and only if an entry is."""
    total = 0.0
    for part in tensor.reshape(-1).split(_SUMMED):
        wide = part.double()
        total += torch.dot(wide, wide).item()
    return total**0.5


def _exact(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U (rows, r), σ (r,), ΣVᵀ (r, columns)) of a matrix that is at most as tall as wide; it is converted to float64 a
    few columns at a time."""
    rows = delta.shape[0]
    step = max(1, _COLUMNS // rows)
    gram = torch.zeros(rows, rows, dtype=torch.float64)
    for part in delta.split(step, dim=1):
        wide = part.double()
        gram.addmm_(wide, wide.T)
    values, vectors = _top(gram, rank)
    u = vectors.flip(1)
    sigma = values.flip(0).clamp_min(0).sqrt()
    return u, sigma, torch.cat([u.T @ part.double() for part in delta.split(step, dim=1)], dim=1)


def _krylov(
    delta: torch.Tensor, rank: int, norm: float, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """As :func:`_exact`; None when an answer that passes the check would take more than half the space."""
    rows, columns = delta.shape
    width = -(-(rank + _OVERSAMPLED) // _MULTIPLE) * _MULTIPLE
    most = rows // 2 // width * width
    if most < _BLOCKS * width:
        return None
    # unused pages are never touched; bases are stored as rows, so growing them moves nothing
    basis, images = torch.empty(most, rows).T, torch.empty(most, columns).T
    gram = torch.empty(most, most, dtype=torch.float64)  # of the images: ΔΔᵀ within the basis
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode("utf-8", "surrogatepass")))
    block = torch.linalg.qr(delta @ torch.randn(columns, width, generator=generator) / norm).Q
    turned = delta.T
    due: float = width
    before: tuple[int, float] | None = None
    for start in range(0, most, width):
        if start == 3 * width:
            delta, turned = delta.contiguous(), turned.contiguous()  # worth a copy from here on: rows are read faster
        held = start + width
        image = turned @ block / norm
        basis[:, start:held], images[:, start:held] = block, image
        gram[:held, start:held] = images[:, :held].double().T @ image.double()
        gram[start:held, :start] = gram[:start, start:held].T
        block, coupling = _orthogonal(delta @ image / norm, basis[:, :held], generator)
        if held < min(due, most):
            continue
        values, vectors = _top(gram[:held, :held], rank)
        values = values.clamp_min(0)
        short = 1 - values.sum().item() / _most_energy(values, coupling @ vectors[-width:])
        if short <= _SHORT:
            vectors = vectors.flip(1).float()
            return basis[:, :held] @ vectors, values.flip(0).sqrt() * norm, (images[:, :held] @ vectors).T * norm
        needed = _needed(before, (held, short))
        if start >= 2 * width and needed > most * _GIVEN_UP:
            return None
        # the first three checks are cheap; later ones wait for most of the way
        due = held + width if start < 2 * width else held + 0.6 * (needed - held)
        before = held, short
    return None


def _top(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``rank`` largest eigenvalues of a symmetric matrix, rising, and their eigenvectors as columns.

    LAPACK's syevr computes no others, which takes a third of the time of all of a large matrix; all of a small one are
    had sooner by divide and conquer.
    """
    size = len(gram)
    if size <= _ALL:
        values, vectors = torch.linalg.eigh(gram)
        return values[-rank:], vectors[:, -rank:]
    pair = scipy.linalg.eigh(gram.numpy(), subset_by_index=[size - rank, size - 1], driver="evr", check_finite=False)
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


def _orthogonal(
    block: torch.Tensor, basis: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthonormal N orthogonal to ``basis``, and S in float64 with block = N S + what lies within the basis.

    A column that loses more than half of its length in the second pass was rounding: the matrix has no more directions.
    A random column replaces it, for which S holds only that rounding.
    """
    coupling = torch.eye(block.shape[1], dtype=torch.float64)
    for again in range(_TIMES):
        block, factor = torch.linalg.qr(block - basis @ (basis.T @ block))
        coupling = factor.double() @ coupling
        rounding = factor.diagonal().abs() < 0.5
        if again and not rounding.any():
            break
        if again:
            fresh = torch.randn(len(block), int(rounding.sum()), generator=generator)
            block[:, rounding] = fresh / len(block) ** 0.5
    return block, coupling


def _most_energy(values: torch.Tensor, coupling: torch.Tensor) -> float:
    """The most energy that ``len(values)`` triplets can hold: see the check in the module docstring."""
    kept = len(values)
    matrix = values[0] * torch.eye(kept + len(coupling), dtype=torch.float64)
    matrix[:kept, :kept] = values.diag()
    matrix[kept:, :kept], matrix[:kept, kept:] = coupling, coupling.T
    return torch.linalg.eigvalsh(matrix)[-kept:].sum().item()


def _needed(before: tuple[int, float] | None, now: tuple[int, float]) -> float:
    """The size of space at which the missed share is small enough, extrapolated from two pairs (size, missed share)."""
    if before is None or now[1] >= before[1]:
        return now[0] if before is None else math.inf
    fall = math.log(before[1] / now[1]) / (now[0] - before[0])
    return now[0] + math.log(now[1] / _SHORT) / fall
