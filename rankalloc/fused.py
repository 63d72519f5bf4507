"""A frozen linear layer and its adapter as one autograd.Function.

    forward    y = x Wᵀ + b;   z = x Aᵀ;   y += z Bᵀ            with A = Q and B = P Λ s
    backward   ∂z = ∂y B;      ∂x = ∂y W;  ∂x += ∂z A;   ∂A = ∂zᵀ x;   ∂B = ∂yᵀ z

Most of what a LoRA layer costs beside a frozen one is passes over activations, not arithmetic: the
adapter's own output, its sum with the layer's, and the same once more for ∂x. Here both products go
into the tensor that is there already, and only x and z are kept for the backward pass; where A is not
trained (LoRA-FA, VeRA), z alone. From B on to P and Λ, and through every cast, the gradients are
autograd's.

Weakness: a product that is added in place may be rounded otherwise than one that is added afterwards,
so the last bit may differ from the plain formula's. That is why only training comes here: in
evaluation, an adapter computes what its exported file does, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
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
    base: nn.Module, kind: str | None, x: torch.Tensor, seen: torch.Tensor, a: torch.Tensor, b: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """base(x) + seen Aᵀ Bᵀ, differentiable in x, seen, A and B, twice as well.

    Args:
        base, kind: the frozen layer and its :func:`rankalloc.base_layers.kind_of`.
        x: what the layer sees, (..., d_in), two dimensions or more.
        seen: what the adapter sees: ``x`` itself, or x after dropout.
        a, b: the factors, (r, d_in) and (d_out, r).
        dtype: from :func:`compute_dtype`; everything is brought to it.

    Returns:
        (..., d_out) in ``dtype``.
    """
    weight = base.weight.t() if kind == "conv1d" else base.weight
    bias = base.bias if base.bias is None else base.bias.to(dtype)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    # None, and not x once more: two inputs would get two gradients of x's size
    dropped = None if seen is x else seen.reshape(-1, x.shape[-1]).to(dtype)
    out = _FusedLinear.apply(rows, dropped, weight.to(dtype), bias, a.to(dtype), b.to(dtype))
    return out.view(*x.shape[:-1], out.shape[-1])


def _is_plain_call(base: nn.Module) -> bool:
    """Whether nothing but forward would run when ``base`` is called, and that the one of its class."""
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    return not hooks and not module_hooks._has_any_global_hook() and "forward" not in vars(base)


class _FusedLinear(torch.autograd.Function):
    """The formula of the module docstring over rows, x (n, d_in); all tensors of one dtype, W and b frozen."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: torch.Tensor, dropped: torch.Tensor | None, weight: torch.Tensor,
        bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor,
    ) -> torch.Tensor:
        seen = x if dropped is None else dropped
        out = F.linear(x, weight, bias)
        z = F.linear(seen, a)
        out.addmm_(z, b.t())
        ctx.shared = dropped is None
        # x is for the gradient of A alone: where A is frozen, z is all that is kept, r numbers a token
        ctx.save_for_backward(seen if ctx.needs_input_grad[4] else None, z, weight, a, b)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # all are of one dtype already; a backward pass inside autocast would have some products cast and some not
        with torch.autocast(grad.device.type, enabled=False):
            return _gradients(grad, *ctx.saved_tensors, ctx.shared, ctx.needs_input_grad)


def _gradients(
    grad: torch.Tensor, seen: torch.Tensor | None, z: torch.Tensor, weight: torch.Tensor, a: torch.Tensor,
    b: torch.Tensor, shared: bool, needed: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """One gradient, or None, for each input of the Function; ``shared`` when base and adapter see one tensor."""
    needs_x, needs_dropped, _, _, needs_a, needs_b = needed
    grad_x = grad_dropped = grad_a = grad_b = None
    if torch.is_grad_enabled() and (needs_x or needs_dropped or needs_a):
        if seen is None:
            raise RankallocError(
                "second derivatives of an adapter whose Q is not trained need the input that it does not keep; take "
                "them in evaluation mode (model.eval())"
            )
        z = F.linear(seen, a)  # the saved one has no history, which a second derivative needs
    if needs_b:
        grad_b = (z.t() @ grad).t()  # and not gradᵀ z, which is up to twice as slow for a few columns
    if needs_x:
        grad_x = grad @ weight
    if needs_x or needs_dropped or needs_a:
        grad_z = grad @ b
        if needs_a:
            grad_a = grad_z.t() @ seen
        if needs_dropped:
            grad_dropped = grad_z @ a
        elif needs_x and shared:
            grad_x.addmm_(grad_z, a)
    return grad_x, grad_dropped, None, None, grad_a, grad_b
