"""Canonical form of many runs at once: what :mod:`rankalloc.adapters.canonical` does, on batches.

The formulas are explained there. Here the pile of matrices is (runs · layers, R, R), zero beyond what a run holds.
"""

from __future__ import annotations

import torch

from .factors import NAMES, Factors

_SINGULAR, _NOTHING = 1e4, 1e-10


@torch.no_grad()
def canonicalize(factors: Factors, runs: torch.Tensor) -> None:
    """Bring ``runs`` (k,) to canonical form; moments and averages follow, and the singular values' order is that of the
    triplets from now on."""
    held = factors.held[runs]
    inside = torch.arange(factors.rank, device=held.device) < held[:, :, None]
    p, q = ([t.data[runs].double() for t in factors.of(name)] for name in ("P", "Q"))
    q = [t.mT for t in q]
    lam = torch.stack([t.data[runs] for t in factors.lam], 1).double()
    (root_p, inverse_p, basis_p), (root_q, inverse_q, basis_q) = (_roots(t, inside, held) for t in (p, q))
    u, sigma, v = _svd((root_p * lam[:, :, None]) @ root_q.mT, held)
    a, b = inverse_p @ u, inverse_q @ v
    to_p, to_q = torch.where(basis_p, u, a), torch.where(basis_q, v, b)
    columns = [t @ to_p[:, layer] for layer, t in enumerate(p)]
    rows = [t @ to_q[:, layer] for layer, t in enumerate(q)]
    sign = torch.stack([t.gather(1, t.abs().argmax(1, keepdim=True))[:, 0].sign() for t in columns], 1)
    sign = torch.where(sign == 0, 1.0, sign)[:, :, None]
    if factors.init == "svd":
        of_p, of_q, new_lam = sign, sign, sigma
        turns = {"P": (root_p.mT @ u) * sign, "lam": a * b, "Q": (v.mT @ root_q) * sign.mT}
    else:
        sigma = torch.where(sigma > _NOTHING * sigma[..., :1], sigma, 0.0)
        c = _q_sizes(sigma, root_q, held)[:, :, None]
        of_p, of_q, new_lam = sigma[:, :, None] / c * sign, c * sign, inside.double()
        in_old = root_q.mT @ v
        turns = {"P": b * of_q, "lam": in_old * b, "Q": (in_old / c * sign).mT}
    weight = turns["lam"].square()
    total, even = weight.sum(2, keepdim=True), 1 / held.clamp_min(1).double()[:, :, None, None]
    mixing = torch.where(total > 0, weight / total.clamp_min(1e-300), even) * inside[..., None, :] * inside[..., None]
    for average in factors.averages.values():
        average[runs] = (average[runs].double()[:, :, None] @ mixing)[:, :, 0].to(average.dtype)
    live = factors.kept[runs].sum(2, keepdim=True)
    factors.kept[runs] = torch.arange(factors.rank, device=held.device) < live
    for layer in range(len(factors.shapes)):
        new = {"P": columns[layer] * of_p[:, layer], "lam": new_lam[:, layer], "Q": (rows[layer] * of_q[:, layer]).mT}
        for name, values in new.items():
            factors.of(name)[layer].data[runs] = values.to(factors.of(name)[layer].dtype)
        for moments, squared in ((factors.first, False), (factors.second, True)):
            for name in NAMES:
                turn = turns[name][:, layer].square() if squared else turns[name][:, layer]
                old = moments[name][layer][runs]
                moments[name][layer][runs] = _turned(name, old, turn.to(old.dtype))


def _turned(name: str, old: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """A moment in the new basis."""
    return turn @ old if name == "Q" else old @ turn if name == "P" else (old[:, None] @ turn)[:, 0]


def _roots(
    tall: list[torch.Tensor], inside: torch.Tensor, held: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """R with RᵀR = FᵀF and its (pseudo-)inverse, both (k, N, R, R), of factors F (k, d, R) by layer.

    Where F is nearly singular, the last value (k, N, 1, 1) is True, and an orthonormal basis has been put in its place.
    """
    grams = torch.stack([t.mT @ t for t in tall], 1)
    padded = grams + torch.diag_embed((~inside).double())
    lower, failed = torch.linalg.cholesky_ex(padded)
    eye = torch.eye(padded.shape[-1], dtype=padded.dtype, device=padded.device)
    root = lower.mT * inside[:, :, None]
    inverse = torch.linalg.solve_triangular(lower.mT, eye, upper=True) * inside[:, :, None]
    condition = root.flatten(2).norm(dim=2) * inverse.flatten(2).norm(dim=2)
    doubtful = (held > 0) & ((failed != 0) | ~(condition < _SINGULAR))
    for run, layer in doubtful.nonzero().tolist():
        rank = int(held[run, layer])
        tall[layer][run, :, :rank], triangle = torch.linalg.qr(tall[layer][run, :, :rank])
        root[run, layer].zero_()[:rank, :rank] = triangle
        inverse[run, layer].zero_()[:rank, :rank] = torch.linalg.pinv(triangle)
    return root, inverse, doubtful[:, :, None, None]


def _svd(cores: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, falling singular values and V of cores (k, N, R, R), each within what is held: beside zeros, a core that is
    singular itself would share its null space with them."""
    u, sigma, v = torch.zeros_like(cores), torch.zeros_like(cores[..., 0]), torch.zeros_like(cores)
    for rank in range(1, cores.shape[-1] + 1):
        alike = held == rank
        if alike.any():
            left, values, right = torch.linalg.svd(cores[alike][:, :rank, :rank])
            u[alike] = _widened(left, cores.shape[-1])
            sigma[alike] = torch.nn.functional.pad(values, (0, cores.shape[-1] - rank))
            v[alike] = _widened(right.mT, cores.shape[-1])
    return u, sigma, v


def _widened(matrices: torch.Tensor, width: int) -> torch.Tensor:
    more = width - matrices.shape[-1]
    return torch.nn.functional.pad(matrices, (0, more, 0, more))


def _q_sizes(sigma: torch.Tensor, root_q: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """c of each triplet where Λ = 1, (k, N, R): √σ, or the length of a row of Q that is about to learn."""
    rms = (root_q.square().sum((2, 3)) / held.clamp_min(1)).sqrt()[:, :, None]
    c = torch.where(sigma > 0, sigma.sqrt(), rms)
    return torch.where(c > 0, c, 1.0)
