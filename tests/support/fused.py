"""One adapter over one layer, its inputs of every kind, and the plain formula it is compared with."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankalloc.adapters.adapter import Adapter

D_IN, D_OUT, RANK = 6, 10, 3
INPUTS = {
    "rows": lambda: torch.randn(5, D_IN),
    "batch": lambda: torch.randn(2, 5, D_IN),
    "four dimensions": lambda: torch.randn(2, 3, 2, D_IN),
    "one row": lambda: torch.randn(1, D_IN),
    "transposed": lambda: torch.randn(5, 2, D_IN).transpose(0, 1),
    "strided": lambda: torch.randn(5, 2 * D_IN)[:, ::2],
    "expanded": lambda: torch.randn(1, 1, D_IN).expand(3, 4, D_IN),
    "empty": lambda: torch.randn(0, 5, D_IN),
}


def make(kind="linear", bias=True, init="svd", dtype=torch.float64, base_dtype=None, dropout=0.0) -> Adapter:
    torch.manual_seed(0)
    base = Conv1D(D_OUT, D_IN) if kind == "conv1d" else nn.Linear(D_IN, D_OUT, bias=bias)
    nn.init.normal_(base.weight)
    adapter = Adapter(base.to(base_dtype or dtype).requires_grad_(False), RANK, 0.7, init, dropout, dtype)
    for factor in (adapter.P, adapter.lam, adapter.Q):
        nn.init.normal_(factor.data)
    return adapter


def plain(adapter: Adapter) -> Adapter:
    """The same adapter, watched by a hook that does nothing: it computes by the plain formula."""
    twin = copy.deepcopy(adapter)
    twin.base_layer.register_forward_hook(lambda *_: None)
    return twin


def is_fused(out: torch.Tensor) -> bool:
    seen, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return any("FusedLinear" in node.name() for node in seen)


def run(adapter: Adapter, x: torch.Tensor, call=None):
    """The output, and the gradients of x and of the factors for a fixed random one of the output."""
    torch.manual_seed(1)  # of dropout
    for factor in adapter.parameters():
        factor.grad = None
    out = adapter(x) if call is None else call(x)
    generator = torch.Generator().manual_seed(2)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
    return {"out": out.detach(), "x": x.grad, "P": adapter.P.grad, "lam": adapter.lam.grad, "Q": adapter.Q.grad}


def compare(adapter, x, tolerance, wanted=True, call=None):
    """``adapter`` gives what its plain twin gives, by the Function if ``wanted``; returns what it gives."""
    call = call or (lambda one, value: one(value))
    twin, results = plain(adapter), []
    for one in (adapter, twin):
        own = x.detach().requires_grad_(x.requires_grad)  # as strided as x is
        results.append(run(one, own, lambda value, one=one: call(one, value)))
    fused, reference = results
    for name, value in reference.items():
        assert (fused[name] is None) == (value is None), name
        if value is not None:
            assert fused[name].dtype == value.dtype and fused[name].shape == value.shape, name
            torch.testing.assert_close(fused[name], value, rtol=tolerance, atol=tolerance, msg=f"{name} differs")
    assert is_fused(call(adapter, x)) == wanted and not is_fused(call(twin, x))
    return fused
