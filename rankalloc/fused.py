"""A frozen linear layer and its adapter as one autograd.Function.

    forward    z = x Qᵀ;   B = P Λ s;   y = [z 1] [B b]ᵀ;   y += x Wᵀ
    backward   ∂z = ∂y B;  ∂x = ∂z Q;   ∂x += ∂y W;   ∂Q = ∂zᵀ x;   ∂B = ∂yᵀ z;   ∂P = ∂B Λ s;   ∂λ = s Σ ∂B ⊙ P

Most of what a LoRA layer costs beside a frozen one is passes over activations and calls from Python, not
arithmetic. Here the adapter writes its output where the layer would have written its bias, and the layer's
product is added in place; ∂x likewise. Only x and z are kept for the backward pass, z alone where Q is not
trained (LoRA-FA, VeRA), and autograd sees one node.

Weakness: a product that is added in place may be rounded otherwise than one that is added afterwards,
so the last bit may differ from the plain formula's. That is why only training comes here: in
evaluation, an adapter computes what its exported file does, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules import module as module_hooks

from .errors import RankallocError
from .layer_kinds import LINEAR

# vmap, grad, jvp and their like cannot pass through a Function that is written to in place; torch has no public
# name for this question, which its own Function.apply asks
_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)
_AUTOCAST_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(base: nn.Module, kind: str | None, x: torch.Tensor, factors: tuple[torch.Tensor, ...]) -> Any:
    """The dtype in which ``fused_linear`` may stand for ``base`` and its adapter, or None when it may not.

    It may when calling ``base`` is nothing but a product with a frozen weight: nn.Linear or Conv1D themselves,
    without hooks, a replaced ``forward`` or computed weights. Types must agree, or be those that autocast
    brings together.

    Args:
        base, kind: the frozen layer and its :func:`rankalloc.base_layers.kind_of`.
        x: the input, (..., d_in).
        factors: P, lam and Q.
    """
    if torch.compiler.is_compiling() or _transformed():  # a compiler fuses the plain formula by itself
        return None
    if kind not in LINEAR or kind == "linear" and type(base) is not nn.Linear or not _is_plain_call(base):
        return None
    parameters = base._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or weight.requires_grad or bias is not None and bias.requires_grad:
        return None
    tensors = (x, weight, *factors) if bias is None else (x, weight, bias, *factors)
    # a subclass (quantised, sharded, fake) has its own idea of a product
    if any(type(t) not in _PLAIN_TENSORS for t in tensors) or x.dim() < 2:
        return None
    if torch.is_autocast_enabled(x.device.type):
        # float64 is what autocast leaves alone
        eligible = all(t.dtype in _AUTOCAST_TYPES for t in tensors)
        return torch.get_autocast_dtype(x.device.type) if eligible else None
    return x.dtype if all(t.dtype == x.dtype for t in tensors) else None


def fused_linear(
    base: nn.Module, kind: str | None, x: torch.Tensor, seen: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scaling: float, dtype: torch.dtype,
) -> torch.Tensor:
    """base(x) + scaling · P Λ Q seen, differentiable in x, seen and the factors, twice as well.

    Args:
        base, kind: the frozen layer and its :func:`rankalloc.base_layers.kind_of`.
        x: what the layer sees, (..., d_in), two dimensions or more.
        seen: what the adapter sees: ``x`` itself, or x after dropout.
        factors: P (d_out, r), lam (r,) and Q (r, d_in).
        scaling: s.
        dtype: from :func:`compute_dtype`; everything is brought to it.

    Returns:
        (..., d_out) in ``dtype``.
    """
    parameters = base._parameters
    weight, bias = parameters["weight"], parameters["bias"]
    if kind == "conv1d":
        weight = weight.t()
    # None, and not x once more: two inputs would get two gradients of x's size
    dropped = None if seen is x else seen
    tensors = (x, dropped, weight, bias, *factors)
    if any(t is not None and t.dtype != dtype for t in tensors):
        tensors = tuple(t if t is None else t.to(dtype) for t in tensors)
    return _FusedLinear.apply(*tensors, scaling)


def _is_plain_call(base: nn.Module) -> bool:
    """Whether nothing but forward would run when ``base`` is called, and that the one of its class."""
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    return not hooks and not module_hooks._has_any_global_hook() and "forward" not in vars(base)


class _FusedLinear(torch.autograd.Function):
    """The formula of the module docstring, x (..., d_in); all tensors of one dtype, W and b frozen."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: torch.Tensor, dropped: torch.Tensor | None, weight: torch.Tensor,
        bias: torch.Tensor | None, p: torch.Tensor, lam: torch.Tensor, q: torch.Tensor, scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        seen = rows if dropped is None else dropped.reshape(rows.shape)
        b = p * (lam * scaling)
        if bias is None:
            z = torch.mm(seen, q.t())
            out = torch.mm(z, b.t())
        else:  # the bias is one more triplet, whose z is 1: no pass over the outputs of its own
            room = seen.new_ones(seen.shape[0], q.shape[0] + 1)
            z = room[:, :-1]
            torch.mm(seen, q.t(), out=z)
            out = torch.mm(room, torch.cat((b.t(), bias[None])))
        out.addmm_(rows, weight.t())
        ctx.shared, ctx.scaling, ctx.shape = dropped is None, scaling, x.shape
        # x is for the gradient of Q alone: where Q is frozen, z is all that is kept, r numbers a token
        kept = x if dropped is None else dropped
        ctx.save_for_backward(kept if ctx.needs_input_grad[6] else None, z, weight, p, lam, q, b)
        return out.resize_(*x.shape[:-1], out.shape[-1])  # and not a view, which may not be changed in place

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not torch.is_autocast_enabled(grad.device.type):
            return _gradients(ctx, grad)
        # all are of one dtype already; a backward pass inside autocast would have some products cast and some not
        with torch.autocast(grad.device.type, enabled=False):
            return _gradients(ctx, grad)


def _gradients(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """One gradient, or None, for each input of the Function."""
    x, z, weight, p, lam, q, b = ctx.saved_tensors
    needs_x, needs_dropped, _, _, needs_p, needs_lam, needs_q, _ = ctx.needs_input_grad
    grad_x = grad_dropped = grad_p = grad_lam = grad_q = None
    seen, grad = x if x is None else x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if torch.is_grad_enabled():  # what was computed in forward has no history, which a second derivative needs
        if seen is None:
            raise RankallocError(
                "second derivatives of an adapter whose Q is not trained need the input that it does not keep; take "
                "them in evaluation mode (model.eval())"
            )
        z, b = torch.mm(seen, q.t()), p * (lam * ctx.scaling)
    if needs_x or needs_dropped or needs_q:
        grad_z = torch.mm(grad, b)
    if needs_p or needs_lam:
        grad_b = torch.mm(z.t(), grad).t()  # and not gradᵀ z, which is up to twice as slow for a few columns
        if needs_p:
            grad_p = grad_b * (lam * ctx.scaling)
        if needs_lam:
            grad_lam = (grad_b * p).sum(0) * ctx.scaling
    if needs_dropped:
        grad_dropped = torch.mm(grad_z, q).view(ctx.shape)
    if needs_x:
        grad_x = torch.mm(grad_z, q).addmm_(grad, weight) if ctx.shared else torch.mm(grad, weight)
        grad_x = grad_x.view(ctx.shape)
    if needs_q:
        grad_q = torch.mm(grad_z.t(), seen)
    return grad_x, grad_dropped, None, None, grad_p, grad_lam, grad_q, None
