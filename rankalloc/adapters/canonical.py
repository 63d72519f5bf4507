"""Canonical form: the same ΔW with orthonormal P and Q and true singular values in Λ.

In training, lam are not singular values and triplets are not singular directions. Thin QR of P = Q_P R_P and
of Qᵀ = Q_Q R_Q, then the SVD of the r × r core R_P Λ R_Qᵀ = U Σ Vᵀ, give

    P' = Q_P U,   Λ' = Σ,   Q' = Vᵀ Q_Qᵀ          in O((d_in + d_out) r²), without forming ΔW.

Where Λ is not trained and stays 1 (plain LoRA), each singular value goes to both sides,

    P' = Q_P U Σ/c,   Q' = c Vᵀ Q_Qᵀ,   c = √Σ,

and a triplet of size zero gets c = ‖Q‖_F/√r: P' is zero there and Q' is not, so it can learn, as LoRA's do at first.
√Σ on each side is the split in which both learn equally fast; on planted ranks and on a small language model it was
ahead of c = 1 and of the row norm that Q begins with.

Dropping the smallest of them is then the best approximation of ΔW in the Frobenius norm (Eckart and
Young, 1936). The gradient changes with the basis, and the optimizer's memory of it has to follow:

    ∂L/∂P' = ∂L/∂P · R_Pᵀ U,   ∂L/∂Q' = Vᵀ R_Q · ∂L/∂Q          (exactly), and
    ∂L/∂λ'_k ≈ Σ_i A_ik B_ik ∂L/∂λ_i  with P' = P A, Q'ᵀ = Qᵀ B   (no off-diagonal terms are known);

with Λ = 1:  ∂L/∂P' = ∂L/∂P · R_Q⁻¹ V c,   ∂L/∂Q' = c⁻¹ Vᵀ R_Q · ∂L/∂Q          (exactly).

:mod:`rankalloc.adapters.optimizer_state` carries that memory over.

Adapters are rewritten many at a time, as one pile of matrices padded with zero columns to equal width: the number of
operators is that of a few piles, not of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ..errors import RankallocError
from . import optimizer_state
from .triplets import TRAINED, Triplets

_SINGULAR = 1e4
"""Condition of a factor from which its Gram matrix is not exact enough in float64 for float32 weights."""


_NOTHING = 1e-10
"""Share of the largest singular value up to which a triplet has no size; the rounding of float32 factors is above."""

_PILE = 2**22
"""Numbers of P and Q that are rewritten at once, at most, unless one adapter has more: 32 MB in float64."""


@dataclass(frozen=True)
class Change:
    """How one adapter's basis changed, all (r, r) in float64: gradients of P and lam are multiplied by
    ``p`` and ``lam`` on the right, those of Q by ``q`` on the left; ``mixing`` is the share of each old triplet (row)
    in each new one (column), whose columns sum to 1."""

    p: torch.Tensor
    lam: torch.Tensor
    q: torch.Tensor
    mixing: torch.Tensor


@torch.no_grad()
def canonicalize(adapter: Triplets, optimizer: torch.optim.Optimizer | None = None) -> Change:
    """:func:`canonicalize_all` of one adapter."""
    return canonicalize_all([adapter], optimizer)[0]


@torch.no_grad()
def canonicalize_all(adapters: Sequence[Triplets], optimizer: torch.optim.Optimizer | None = None) -> list[Change]:
    """Rewrite every adapter in canonical form, singular values falling; each ΔW stays what it was.

    Signs are fixed (the entry of each column of P that is largest in size is positive), so that equal
    weights give equal factors.

    Args:
        optimizer: whose memory of the adapters' gradients is carried over; None to leave it alone.

    Raises:
        RankallocError: a weight is not finite, an adapter has a fixed basis, or the optimizer remembers
            something that cannot be carried over; whole adapters may have been rewritten then, none in part.
    """
    for adapter in adapters:
        if not {"P", "Q"} <= set(TRAINED[adapter.init]):
            raise RankallocError(
                f"canonical form rewrites both P and Q, and these adapters train at most one of them: they were "
                f"attached with init={adapter.init!r}"
            )
    changes = [Change(*[adapter.lam.new_zeros(0, 0, dtype=torch.float64)] * 4) for adapter in adapters]
    for indices in _together(adapters):
        found = _rewrite([adapters[index] for index in indices], optimizer)
        for index, change in zip(indices, found, strict=True):
            changes[index] = change
    return changes


def _together(adapters: Sequence[Triplets]) -> Iterator[list[int]]:
    """Indices of adapters that are rewritten at once: of one device and one form, and not too many. Those of rank 0 are
    left out."""
    alike: dict[tuple[torch.device, bool], list[int]] = {}
    for index, adapter in enumerate(adapters):
        if adapter.rank:
            alike.setdefault((adapter.lam.device, adapter.sized_by_factors), []).append(index)
    for indices in alike.values():
        some: list[int] = []
        size = 0
        for index in indices:
            numbers = adapters[index].rank * adapters[index].params_per_rank
            if some and size + numbers > _PILE:
                yield some
                some, size = [], 0
            some.append(index)
            size += numbers
        yield some


def _rewrite(adapters: Sequence[Triplets], optimizer: torch.optim.Optimizer | None) -> list[Change]:
    """:func:`canonicalize_all` of adapters on one device and of one form; matrices (n, r, r) are theirs on a pile, r
    the largest rank, and zero beyond an adapter's own."""
    lam = _widened([adapter.lam for adapter in adapters])
    p, q = (_Pile([getattr(adapter, name) for adapter in adapters], lam.shape[1], name == "Q") for name in ("P", "Q"))
    lam_finite = torch.isfinite(lam.sum())
    if not (lam_finite & torch.isfinite(p.grams.sum()) & torch.isfinite(q.grams.sum())):
        raise RankallocError(
            "an adapter's weights are not finite: training has diverged; lower the learning rate, or clip the "
            "gradients (max_grad_norm)"
        )
    ranks = [adapter.rank for adapter in adapters]
    (r_p, to_p), (r_q, to_q) = p.roots(ranks), q.roots(ranks)
    u, sigma, v = _svd((r_p * lam[:, None]) @ r_q.mT, ranks)
    a, b = to_p @ u, to_q @ v
    columns, rows = p.turned(u, a), q.turned(v, b)
    sign = torch.ones_like(lam)
    for indices, new in columns:
        sign[indices] = torch.sign(new.gather(1, new.abs().argmax(1, keepdim=True)))[:, 0]
    sign = torch.where(sign == 0, 1.0, sign)[:, None]
    if adapters[0].sized_by_factors:
        sigma = torch.where(sigma > _NOTHING * sigma[:, :1], sigma, 0.0)
        c = _q_sizes(sigma, q.grams, ranks)[:, None]
        of_p, of_q, new_lam = sigma[:, None] / c * sign, c * sign, torch.ones_like(sigma)
        in_old = r_q.mT @ v  # P' = P R_Qᵀ V c⁻¹, also where P is singular
        turns = {"P": b * of_q, "lam": in_old * b, "Q": (in_old / c * sign).mT}
    else:
        of_p = of_q = sign
        new_lam = sigma
        turns = {"P": (r_p.mT @ u) * sign, "lam": a * b, "Q": (v.mT @ r_q) * sign.mT}
    weight = turns["lam"].square()
    total, even = weight.sum(1, keepdim=True), lam.new_tensor([1 / rank for rank in ranks])
    mixing = torch.where(total > 0, weight / total.clamp_min(1e-300), even[:, None, None])

    @cache
    def turned(name: str, squared: bool, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return (turns[name].square() if squared else turns[name]).to(dtype).unbind()

    # falling singular values: what was live before comes first, what had been dropped has none
    live = _widened([adapter.kept for adapter in adapters]).sum(1, keepdim=True)
    kept = torch.arange(lam.shape[1], device=lam.device) < live
    if optimizer is not None:  # before any weight is written, for it may raise
        for i, (adapter, rank) in enumerate(zip(adapters, ranks, strict=True)):
            optimizer_state.turn(adapter, optimizer, lambda *asked, i=i, rank=rank: turned(*asked)[i][:rank, :rank])
    for i, (adapter, rank) in enumerate(zip(adapters, ranks, strict=True)):
        adapter.kept.copy_(kept[i, :rank])
        adapter.lam.copy_(new_lam[i, :rank])
    for indices, new in columns:
        for index, own in zip(indices, new.mul_(of_p[indices]), strict=True):
            adapters[index].P.copy_(own[:, : ranks[index]])
    for indices, new in rows:
        for index, own in zip(indices, new.mul_(of_q[indices]), strict=True):
            adapters[index].Q.copy_(own[:, : ranks[index]].T)
    of_each = zip(*(pile.unbind() for pile in (*turns.values(), mixing)), strict=True)
    return [Change(*(pile[:rank, :rank] for pile in own)) for own, rank in zip(of_each, ranks, strict=True)]


def _q_sizes(sigma: torch.Tensor, grams: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """c of each triplet where Λ = 1, (n, r): the length of its row of Q, √σ or that of one that is about to learn.

    Args:
        sigma: singular values, (n, r).
        grams: Q Qᵀ as it was, (n, r, r).
    """
    rms = (grams.diagonal(dim1=-2, dim2=-1).sum(1) / sigma.new_tensor(ranks)).sqrt()[:, None]
    c = torch.where(sigma > 0, sigma.sqrt(), rms)
    return torch.where(c > 0, c, 1.0)


def _widened(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Vectors (r_i,) as rows (n, r) in float64, with zeros after them."""
    return torch.nn.utils.rnn.pad_sequence([vector.double() for vector in vectors], batch_first=True)


def _svd(cores: torch.Tensor, ranks: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (n, r, r), falling singular values (n, r) and V (n, r, r) of cores (n, r, r), each within its own rank: beside
    zeros, a core that is singular itself would share its null space with them."""
    u, sigma, v = torch.zeros_like(cores), torch.zeros_like(cores[:, 0]), torch.zeros_like(cores)
    for rank in sorted({*ranks}):
        alike = [index for index, own in enumerate(ranks) if own == rank]
        left, values, right = torch.linalg.svd(cores[alike, :rank, :rank])
        u[alike, :rank, :rank], sigma[alike, :rank], v[alike, :rank, :rank] = left, values, right.mT
    return u, sigma, v


class _Pile:
    """Tall factors (d, r_i), or as ``rows`` (r_i, d), as float64 piles (m, d, r), one for every d.

    Attributes:
        grams: FᵀF of each, (n, r, r).
    """

    def __init__(self, factors: Sequence[torch.Tensor], width: int, rows: bool) -> None:
        self.exact = [factor.dtype == torch.float64 for factor in factors]
        self.grams = torch.zeros(len(factors), width, width, dtype=torch.float64, device=factors[0].device)
        by_size: dict[int, list[int]] = {}
        for index, factor in enumerate(factors):
            by_size.setdefault(factor.shape[rows], []).append(index)
        self._piles = []
        for size, indices in by_size.items():
            pile = self.grams.new_zeros(len(indices), size, width)
            for own, index in zip(pile, indices, strict=True):
                factor = factors[index].T if rows else factors[index]
                own[:, : factor.shape[1]] = factor
            self.grams[indices] = pile.mT @ pile
            self._piles.append((indices, pile))

    def roots(self, ranks: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """R with RᵀR = FᵀF and its (pseudo-)inverse, both (n, r, r).

        The Cholesky factor of FᵀF costs a fifth of a Householder QR of F and squares its condition, which float64 has
        room for; factors that are float64 themselves, or nearly singular, take the QR.
        """
        width = self.grams.shape[1]
        inside = torch.arange(width, device=self.grams.device) < torch.tensor(ranks, device=self.grams.device)[:, None]
        padded = self.grams + torch.diag_embed((~inside).double())
        lower, failed = torch.linalg.cholesky_ex(padded)
        eye = torch.eye(width, dtype=padded.dtype, device=padded.device)
        root = lower.mT * inside[:, None]
        inverse = torch.linalg.solve_triangular(lower.mT, eye, upper=True) * inside[:, None]
        condition = root.flatten(1).norm(dim=1) * inverse.flatten(1).norm(dim=1)
        doubtful = ((failed != 0) | ~(condition < _SINGULAR)).tolist()
        self.exact = [one or other for one, other in zip(self.exact, doubtful, strict=True)]
        for indices, pile in self._piles:
            for own, index in zip(pile, indices, strict=True):
                rank = ranks[index]
                if self.exact[index]:
                    own[:, :rank], triangle = torch.linalg.qr(own[:, :rank])
                    root[index].zero_()[:rank, :rank] = triangle
                    inverse[index].zero_()[:rank, :rank] = torch.linalg.pinv(triangle)
        return root, inverse

    def turned(self, of_basis: torch.Tensor, of_factor: torch.Tensor) -> list[tuple[list[int], torch.Tensor]]:
        """For every d the indices of its factors and F · ``of_factor`` (n, r, r), (m, d, r), or where :meth:`roots` put
        an orthonormal basis in F's place, that one times ``of_basis`` (n, r, r)."""
        exact = torch.tensor(self.exact, device=of_basis.device)[:, None, None]
        turns = torch.where(exact, of_basis, of_factor)
        return [(indices, pile @ turns[indices]) for indices, pile in self._piles]
