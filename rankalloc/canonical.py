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

from collections.abc import Iterable
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
    """Rewrite ``adapter`` in canonical form, singular values falling; ΔW stays what it was.

    Signs are fixed (the entry of each column of P that is largest in size is positive), so that equal
    weights give equal factors.

    Args:
        optimizer: whose memory of the adapter's gradients is carried over; None to leave it alone.

    Raises:
        RankallocError: a weight is not finite, the adapter has a fixed Λ, or the optimizer remembers
            something that cannot be carried over.
    """
    if not {"P", "lam", "Q"} <= set(TRAINED[adapter.init]):
        raise RankallocError(
            f"canonical form needs a trained Λ between trained factors; these adapters were attached with "
            f"init={adapter.init!r}"
        )
    if not adapter.rank:
        empty = adapter.lam.new_zeros(0, 0, dtype=torch.float64)
        return Change(empty, empty, empty)
    q_p, r_p = torch.linalg.qr(adapter.P.double())
    q_q, r_q = torch.linalg.qr(adapter.Q.double().T)
    core = (r_p * adapter.lam.double()) @ r_q.T
    if not torch.isfinite(core).all():
        raise RankallocError(
            "an adapter's weights are not finite: training has diverged; lower the learning rate, or clip the "
            "gradients (max_grad_norm)"
        )
    u, sigma, vh = torch.linalg.svd(core)
    p_new = q_p @ u
    sign = torch.sign(p_new.gather(0, p_new.abs().argmax(0, keepdim=True)).squeeze(0))
    sign = torch.where(sign == 0, 1.0, sign)
    u, vh, p_new = u * sign, vh * sign[:, None], p_new * sign
    a, b = torch.linalg.pinv(r_p) @ u, torch.linalg.pinv(r_q) @ vh.T
    change = Change(p=r_p.T @ u, lam=a * b, q=vh @ r_q)
    if optimizer is not None:
        _carry(adapter, optimizer, change)
    # falling singular values: what was live before comes first, what had been dropped has none
    adapter.kept.copy_(torch.arange(adapter.rank, device=adapter.kept.device) < adapter.live_rank)
    adapter.P.copy_(p_new)
    adapter.lam.copy_(sigma)
    adapter.Q.copy_(vh @ q_q.T)
    return change


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
            old = (eight_bit.unpacked(state, key) if is_packed else value).double()
            turn = matrix.square() if order == "second" else matrix
            new = turn @ old if name == "q" else old @ turn
            if is_packed:
                state.update(eight_bit.packed(state, key, new))
            else:
                value.copy_(new)
