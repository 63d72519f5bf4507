"""Frozen linear layers that read one tensor, and their adapters, as one autograd.Function.

    forward    z = x Qᵀ;   B = P Λ s;   y = [z 1] [B b]ᵀ;   y += x Wᵀ
    backward   ∂z = ∂y B;  ∂x = ∂z Q;   ∂x += ∂y W;   ∂Q = ∂zᵀ x;   ∂B = ∂yᵀ z;   ∂P = ∂B Λ s;   ∂λ = s Σ ∂B ⊙ P

Where oneDNN multiplies by W (:mod:`rankalloc.layers.products`), its product comes first and the adapter's is added in
place.

Usually there is one layer. For several (:mod:`rankalloc.layers.families`), x Qᵀ, ∂z Q and ∂zᵀ x are one product each,
with the Qs stacked, and ∂x is one buffer to which each layer adds.

The extra cost of a LoRA layer over a frozen one is mostly passes over activations and calls from Python, not
arithmetic. Here the adapter writes its output where the layer would have written its bias, and the layer's product is
added in place; ∂x likewise. Only x and z are kept for the backward pass, z alone if Q is not trained (LoRA-FA, VeRA),
and autograd sees one node.

Weakness: a product that is added in place may be rounded differently from one that is added afterwards, so the last bit
may differ from the plain formula's. Therefore only training uses this path: in evaluation, an adapter computes exactly
what its exported file does, to the bit.

On the CPU, in float32 and with Q trained, :mod:`rankalloc.layers.native` does the same without Python, if it was built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from ..errors import RankallocError
from . import native, products
from .kinds import LINEAR

# vmap, grad, jvp and similar transforms cannot pass through a Function that writes in place; torch has no public name
# for this query, which its own Function.apply makes
_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_PLAIN_TENSORS = {torch.Tensor, nn.Parameter}
# the Function's arguments: scalings, onednn, x, dropped; then weight, bias, P, lam, Q of each layer
_X, _DROPPED, _FIRST, _PER_LAYER = 2, 3, 4, 5
_AUTOCAST_TYPES = {torch.float32, torch.bfloat16, torch.float16}


class Layer(NamedTuple):
    """One frozen layer and its adapter: base (of ``kind``, :func:`rankalloc.layers.adaptable.kind_of`), the factors
    P (d_out, r), lam (r,) and Q (r, d_in), or none if the adapter has no triplet, and the scaling s."""

    base: nn.Module
    kind: str | None
    factors: tuple[torch.Tensor, ...]
    scaling: float


def compute_dtype(layer: Layer, x: torch.Tensor) -> torch.dtype | None:
    """The dtype in which :func:`fused_linear` may compute ``layer`` on x, (..., d_in); None when it may not.

    It may when calling the base layer is nothing but a product with a frozen weight: nn.Linear or Conv1D themselves,
    without hooks, a replaced ``forward`` or computed weights. Dtypes must agree, or be those that autocast unifies.
    """
    base, kind, factors, _ = layer
    if torch.compiler.is_compiling() or _transformed():  # a compiler fuses the plain formula by itself
        return None
    if kind not in LINEAR or kind == "linear" and type(base) is not nn.Linear or not _is_plain_call(base):
        return None
    parameters = base._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or weight.requires_grad or bias is not None and bias.requires_grad:
        return None
    # every layer comes here at every step: sets of so few cost half of what a generator does
    tensors = (x, weight, *factors) if bias is None else (x, weight, bias, *factors)
    # a subclass (quantised, sharded, fake) defines its own product
    if not {type(t) for t in tensors} <= _PLAIN_TENSORS or x.dim() < 2:
        return None
    dtypes = {t.dtype for t in tensors}
    if torch.is_autocast_enabled(x.device.type):
        # autocast leaves float64 alone
        return torch.get_autocast_dtype(x.device.type) if dtypes <= _AUTOCAST_TYPES else None
    return x.dtype if len(dtypes) == 1 else None


def fused_linear(
    layers: Sequence[Layer], x: torch.Tensor, dtype: torch.dtype, dropped: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """base(x) + s · P Λ Q x of every layer, twice differentiable in x, ``dropped`` and the factors.

    Args:
        layers: all of them read x; usually one.
        x: (..., d_in), two dimensions or more.
        dtype: from :func:`compute_dtype`; everything is cast to it.
        dropped: x after dropout, the input of the adapter if it is not x; for a single layer only.

    Returns:
        For each layer (..., d_out) in ``dtype``.
    """
    tensors: list[Any] = [x, dropped]
    for layer in layers:
        tensors += [*_frozen(layer), *layer.factors]
    if {t.dtype for t in tensors if t is not None} != {dtype}:
        tensors = [t if t is None else t.to(dtype) for t in tensors]
    scalings, onednn = [layer.scaling for layer in layers], products.chosen(tensors[0], tensors[2::_PER_LAYER])
    compiled = native.fused_linear() if dtype is torch.float32 and x.is_cpu else None
    if compiled is not None and all([layer.factors[2].requires_grad for layer in layers]):
        return tuple(compiled(tensors[0], tensors[1], tensors[2:], scalings, onednn))
    return _FusedLinear.apply(scalings, onednn, *tensors)


def frozen_linear(base: nn.Module, kind: str | None, x: torch.Tensor) -> torch.Tensor:
    """base(x) of a layer without triplets while others are trained, (..., d_out)."""
    # a layer without triplets costs no more than its base: without oneDNN nothing else is checked
    if not torch.compiler.is_compiling() and products.uses_onednn():
        layer = Layer(base, kind, (), 1.0)
        if compute_dtype(layer, x) is x.dtype:
            weight, bias = _frozen(layer)
            if products.chosen(x, [weight]):
                return products.FrozenLinear.apply(x, weight, bias)
    return base(x)


def _frozen(layer: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W (d_out, d_in) and b."""
    parameters: dict[str, Any] = layer.base._parameters
    weight = parameters["weight"]
    return weight.t() if layer.kind == "conv1d" else weight, parameters["bias"]


def _is_plain_call(base: nn.Module) -> bool:
    """Whether a call of ``base`` runs nothing but the forward of its class."""
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    return not hooks and not module_hooks._has_any_global_hook() and "forward" not in base.__dict__


class _FusedLinear(torch.autograd.Function):
    """The formula of the module docstring, x (..., d_in); all tensors of one dtype, W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any, scalings: Sequence[float], onednn: bool, x: torch.Tensor, dropped: torch.Tensor | None,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        seen = rows if dropped is None else dropped.reshape(rows.shape)
        layers = _by_layer(tensors)
        outs, computed = [], []
        zs = _project(seen, layers, biased=not onednn)
        for (weight, bias, p, lam, _), z, scaling in zip(layers, zs, scalings, strict=True):
            scale = lam * scaling
            b = p * scale
            if onednn:
                out = products.product(rows, weight, bias).addmm_(z, b.t())
            else:
                # the bias is one more triplet, whose z is 1: it needs no extra pass over the outputs
                out = torch.mm(z, b.t() if bias is None else torch.cat((b.t(), bias[None])))
                out.addmm_(rows, weight.t())
            # not a view, because autograd forbids changing a view in place
            outs.append(out.resize_(*x.shape[:-1], out.shape[-1]))
            computed += [z, scale, b]
        ctx.scalings, ctx.onednn, ctx.shape, ctx.shared = scalings, onednn, x.shape, dropped is None
        ctx.set_materialize_grads(False)
        # x is needed for the gradient of Q alone: if no Q is trained, only z is kept, r numbers per token
        kept = x if dropped is None else dropped
        ctx.save_for_backward(kept if any(_of_q(ctx.needs_input_grad)) else None, *tensors, *computed)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        kind = next((grad.device.type for grad in grads if grad is not None), None)
        if kind is None or not torch.is_autocast_enabled(kind):
            return _gradients(ctx, grads)
        # all have one dtype already; inside autocast a backward pass would cast some products and not others
        with torch.autocast(kind, enabled=False):
            return _gradients(ctx, grads)


def _gradients(ctx: Any, grads: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    """One gradient, or None, for each input of the Function."""
    x, *tensors = ctx.saved_tensors
    arguments = _PER_LAYER * len(grads)
    layers, computed = _by_layer(tensors[:arguments]), tensors[arguments:]
    needs_x, needs_dropped = ctx.needs_input_grad[_X:_FIRST]
    trains_q = any(_of_q(ctx.needs_input_grad))
    found: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
    seen: Any = x if x is None else x.reshape(-1, x.shape[-1])
    again = torch.is_grad_enabled()
    if again and seen is None:
        raise RankallocError(
            "second derivatives of an adapter whose Q is not trained need an input that it does not keep; compute "
            "them in evaluation mode (model.eval())"
        )
    used = []  # first argument, weight, Q, ∂y and ∂z of each layer whose output was used
    for index, ((weight, _, p, lam, q), grad) in enumerate(zip(layers, grads, strict=True)):
        if grad is None:
            continue
        first, scaling = _FIRST + _PER_LAYER * index, ctx.scalings[index]
        z, scale, b = computed[3 * index : 3 * index + 3]
        if again:  # a second derivative needs a history, which the tensors of the forward pass do not have
            z, scale = torch.mm(seen, q.t()), lam * scaling
            b = p * scale
        grad = grad.reshape(-1, grad.shape[-1])
        needs_p, needs_lam = ctx.needs_input_grad[first + 2 : first + 4]
        if needs_p or needs_lam:
            # not gradᵀ z, which is up to twice as slow for a few columns
            grad_b = torch.mm(z[:, : q.shape[0]].t(), grad).t()
            if needs_p:
                found[first + 2] = grad_b * scale
            if needs_lam:
                found[first + 3] = torch.linalg.vecdot(grad_b, p, dim=0) * scaling
        if needs_x or needs_dropped or trains_q:
            used.append((first, weight, q, grad, torch.mm(grad, b)))
    if not used:
        return tuple(found)
    firsts, weights, qs, ys, zs = zip(*used, strict=True)
    alone = len(used) == 1
    stacked_q, grad_z = (qs[0], zs[0]) if alone else (torch.cat(qs), torch.cat(zs, dim=1))
    if needs_dropped:
        found[_DROPPED] = torch.mm(grad_z, stacked_q).view(ctx.shape)
    if needs_x:
        update = (grad_z, stacked_q) if ctx.shared else None
        by_onednn = ctx.onednn and not again  # oneDNN's products have no derivatives
        found[_X] = (_through_by_onednn if by_onednn else _through)(ys, weights, update).view(ctx.shape)
    if trains_q:
        grad_q = torch.mm(grad_z.t(), seen)
        for first, own in zip(firsts, [grad_q] if alone else grad_q.split([q.shape[0] for q in qs]), strict=True):
            found[first + 4] = own if ctx.needs_input_grad[first + 4] else None
    return tuple(found)


def _through(
    ys: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], update: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """∂x, (n, d_in): Σ ∂y W + ∂z Q."""
    grad_x = torch.mm(*update).addmm_(ys[0], weights[0]) if update else torch.mm(ys[0], weights[0])
    for grad, weight in zip(ys[1:], weights[1:], strict=True):
        grad_x.addmm_(grad, weight)
    return grad_x


def _through_by_onednn(
    ys: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], update: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    grad_x = products.product(ys[0], weights[0].t())
    for grad, weight in zip(ys[1:], weights[1:], strict=True):
        grad_x = products.product_plus(grad, weight.t(), grad_x)
    return grad_x.addmm_(*update) if update else grad_x


def _by_layer(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    return [tensors[i : i + _PER_LAYER] for i in range(0, len(tensors), _PER_LAYER)]


def _of_q(arguments: Sequence[Any]) -> Sequence[Any]:
    return arguments[_FIRST + 4 :: _PER_LAYER]


def _project(seen: torch.Tensor, layers: Sequence[Sequence[Any]], biased: bool) -> Sequence[torch.Tensor]:
    """x Qᵀ of every layer; if ``biased``, followed by a column of ones where the layer has a bias."""
    if not biased:
        layers = [(weight, None, *factors) for weight, _, *factors in layers]
    if len(layers) == 1:
        _, bias, _, _, q = layers[0]
        if bias is None:
            return [torch.mm(seen, q.t())]
        z = seen.new_ones(seen.shape[0], q.shape[0] + 1)
        torch.mm(seen, q.t(), out=z[:, :-1])
        return [z]
    stacked, widths = [], []
    for _, bias, _, _, q in layers:
        stacked += [q] if bias is None else [q, q.new_zeros(1, q.shape[1])]
        widths.append(q.shape[0] + (bias is not None))
    zs = torch.mm(seen, torch.cat(stacked).t()).split(widths, dim=1)
    for z, (_, bias, *_) in zip(zs, layers, strict=True):
        if bias is not None:
            z[:, -1] = 1
    return zs
