"""Canonical form: the same ΔW with orthonormal P and Q and true singular values in Λ.

Without it, lam are no singular values and a triplet is no singular direction. Thin QR of P = Q_P R_P and
of Qᵀ = Q_Q R_Q, then the SVD of the r × r core R_P Λ R_Qᵀ = U Σ Vᵀ, give

    P' = Q_P U,   Λ' = Σ,   Q' = Vᵀ Q_Qᵀ          in O((d_in + d_out) r²), without forming ΔW.

Dropping the smallest of them is then the best approximation of ΔW in the Frobenius norm (Eckart and
Young, 1936). The gradient changes with the basis, and what an optimizer remembers of it has to follow:

    ∂L/∂P' = ∂L/∂P · R_Pᵀ U,   ∂L/∂Q' = Vᵀ R_Q · ∂L/∂Q          (exactly), and
    ∂L/∂λ'_k ≈ Σ_i A_ik B_ik ∂L/∂λ_i  with P' = P A, Q'ᵀ = Qᵀ B   (no off-diagonal terms are known).

Squared gradients follow with the squared coefficients, as if entries were uncorrelated; of Adafactor's factored ones
only the factor that counts triplets changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from . import eight_bit
from .adapter import TRAINED, Adapter
from .compact import unwrap
from .errors import NotAdaptedError, RankallocError

_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")
# factored second moments (Adafactor): means over columns, and over rows
_ROWS, _COLUMNS = ("exp_avg_sq_row", "row_var"), ("exp_avg_sq_col", "col_var")

_SINGULAR = 1e4
"""Condition of a factor from which its Gram matrix is not exact enough in float64 for float32 weights."""


@dataclass(frozen=True)
class Change:
    """How one adapter's basis changed, all (r, r) in float64: gradients of P and lam are multiplied by
    ``p`` and ``lam`` on the right, those of Q by ``q`` on the left."""

    p: torch.Tensor
    lam: torch.Tensor
    q: torch.Tensor

    @property
    def mixing(self) -> torch.Tensor:
        """Share of each old triplet (row) in each new one (column); columns sum to 1."""
        weight = self.lam.square()
        total = weight.sum(0, keepdim=True)
        return torch.where(total > 0, weight / total.clamp_min(1e-300), 1.0 / max(1, len(weight)))


@torch.no_grad()
def canonicalize(adapter: Adapter, optimizer: torch.optim.Optimizer | None = None) -> Change:
    """:func:`canonicalize_all` of one adapter."""
    return canonicalize_all([adapter], optimizer)[0]


@torch.no_grad()
def canonicalize_all(adapters: Sequence[Adapter], optimizer: torch.optim.Optimizer | None = None) -> list[Change]:
    """Rewrite every adapter in canonical form, singular values falling; each ΔW stays what it was.

    Signs are fixed (the entry of each column of P that is largest in size is positive), so that equal
    weights give equal factors. What is r × r is computed for all adapters of one rank at once.

    Args:
        optimizer: whose memory of the adapters' gradients is carried over; None to leave it alone.

    Raises:
        RankallocError: a weight is not finite, an adapter has a fixed Λ, or the optimizer remembers
            something that cannot be carried over; the adapters of other ranks may have been rewritten then.
    """
    changes: dict[int, Change] = {}
    by_rank: dict[tuple[int, torch.device], list[int]] = {}
    for index, adapter in enumerate(adapters):
        if not {"P", "lam", "Q"} <= set(TRAINED[adapter.init]):
            raise RankallocError(
                f"canonical form needs a trained Λ between trained factors; these adapters were attached with "
                f"init={adapter.init!r}"
            )
        by_rank.setdefault((adapter.rank, adapter.lam.device), []).append(index)
    for (rank, _), indices in by_rank.items():
        group = [adapters[index] for index in indices]
        if rank:
            found = _of_one_rank(group, optimizer)
        else:
            empty = group[0].lam.new_zeros(0, 0, dtype=torch.float64)
            found = [Change(empty, empty, empty)] * len(group)
        changes.update(zip(indices, found, strict=True))
    return [changes[index] for index in range(len(adapters))]


def _of_one_rank(adapters: Sequence[Adapter], optimizer: torch.optim.Optimizer | None) -> list[Change]:
    """:func:`canonicalize_all` of adapters of one rank r > 0 on one device; matrices (n, r, r) are theirs on a pile."""
    r_p, inverse_p, bases_p = _roots([adapter.P for adapter in adapters])
    r_q, inverse_q, bases_q = _roots([adapter.Q.T for adapter in adapters])
    lam = torch.stack([adapter.lam.double() for adapter in adapters])
    core = (r_p * lam[:, None]) @ r_q.mT
    if not torch.isfinite(core).all():
        raise _not_finite()
    u, sigma, vh = torch.linalg.svd(core)
    a = inverse_p @ u
    columns = [
        adapter.P.double() @ to_new if basis is None else basis @ own
        for adapter, basis, to_new, own in zip(adapters, bases_p, a, u, strict=True)
    ]
    sign = torch.sign(torch.cat([new.gather(0, new.abs().argmax(0, keepdim=True)) for new in columns]))
    sign = torch.where(sign == 0, 1.0, sign)
    u, a, vh = u * sign[:, None], a * sign[:, None], vh * sign[:, :, None]
    b = inverse_q @ vh.mT
    live = torch.stack([adapter.kept for adapter in adapters]).sum(1, keepdim=True)
    kept = torch.arange(adapters[0].rank, device=live.device) < live
    changes = [Change(*matrices) for matrices in zip(r_p.mT @ u, a * b, vh @ r_q, strict=True)]
    for i, (adapter, change) in enumerate(zip(adapters, changes, strict=True)):
        if optimizer is not None:
            _carry(adapter, optimizer, change)
        basis = bases_q[i]
        rows = b[i].T @ adapter.Q.double() if basis is None else vh[i] @ basis.T
        # falling singular values: what was live before comes first, what had been dropped has none
        adapter.kept.copy_(kept[i])
        adapter.P.copy_(columns[i] * sign[i])
        adapter.lam.copy_(sigma[i])
        adapter.Q.copy_(rows)
    return changes


def _roots(factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    """R with RᵀR = FᵀF for each F (d, r), its (pseudo-)inverse, both (n, r, r) in float64, and an orthonormal basis
    (d, r) of F where F R⁻¹ is not one.

    The Cholesky factor of FᵀF costs a fifth of a Householder QR of F and squares its condition, which float64 has room
    for; factors that are float64 themselves, or nearly singular, take the QR.
    """
    grams = torch.stack([(wide := factor.double()).T @ wide for factor in factors])
    if not torch.isfinite(grams).all():
        raise _not_finite()
    lower, failed = torch.linalg.cholesky_ex(grams)
    root = lower.mT.contiguous()
    eye = torch.eye(len(root[0]), dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(root, eye, upper=True)
    condition = root.flatten(1).norm(dim=1) * inverse.flatten(1).norm(dim=1)
    exact = (failed != 0) | ~(condition < _SINGULAR)
    bases: list[torch.Tensor | None] = [None] * len(factors)
    for index, (factor, needed) in enumerate(zip(factors, exact.tolist(), strict=True)):
        if needed or factor.dtype == torch.float64:
            bases[index], root[index] = torch.linalg.qr(factor.double())
            inverse[index] = torch.linalg.pinv(root[index])
    return root, inverse, bases


def _not_finite() -> RankallocError:
    return RankallocError(
        "an adapter's weights are not finite: training has diverged; lower the learning rate, or clip the "
        "gradients (max_grad_norm)"
    )


def check(adapters: Iterable[Adapter], optimizer: torch.optim.Optimizer | None) -> None:
    """Make sure at the first step that the optimizer's memory can follow a change of basis.

    Raises:
        NotAdaptedError: no optimizer is given.
        RankallocError: it remembers something that cannot be carried over.
    """
    if optimizer is None:
        raise NotAdaptedError(
            "changing the basis needs the optimizer: call controller.update(optimizer), or use canonical=False"
        )
    for adapter in adapters:
        _carry(adapter, optimizer, None)


def _carry(adapter: Adapter, optimizer: torch.optim.Optimizer, change: Change | None) -> None:
    """Carry the optimizer's memory over; with no change, only look whether that could be done."""
    optimizer = unwrap(optimizer)
    for parameter, name in ((adapter.P, "p"), (adapter.lam, "lam"), (adapter.Q, "q")):
        state = optimizer.state.get(parameter, {})
        for key, value in list(state.items()):
            if not isinstance(value, torch.Tensor) or value.dim() == 0 or eight_bit.belongs_to_packed(state, key):
                continue
            if parameter.dim() == 2 and key in (*_ROWS, *_COLUMNS):
                if change is not None and (key in _COLUMNS) == (name == "p"):
                    turn, flat = getattr(change, name).square(), value.double().flatten()
                    value.copy_((turn @ flat if name == "q" else flat @ turn).reshape(value.shape))
                continue
            plain = "first" if key in _FIRST else "second" if key in _SECOND else None
            order = eight_bit.meaning(optimizer, key) or plain
            if order is None or value.shape != parameter.shape:
                raise RankallocError(
                    f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)}, which cannot be carried to "
                    "another basis; use AdamW, Adafactor or SGD, or the option canonical=False"
                )
            if change is None:
                continue
            matrix = getattr(change, name)
            is_packed = eight_bit.is_packed(state, key)
            old = eight_bit.unpacked(state, key) if is_packed else value
            old = old.to(torch.promote_types(old.dtype, torch.float32))
            turn = (matrix.square() if order == "second" else matrix).to(old.dtype)
            new = turn @ old if name == "q" else old @ turn
            if is_packed:
                state.update(eight_bit.packed(state, key, new))
            else:
                value.copy_(new)
