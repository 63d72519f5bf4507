"""The fused layer: the plain formula's numbers in every setting it takes, and the plain path in every other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rankalloc as ra
from tests.support.fused import D_IN, D_OUT, INPUTS, RANK, compare, is_fused, make, plain, run
from tests.support.models import prune


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_the_numbers_are_the_plain_formulas(kind, name, dtype, tolerance):
    if kind == "conv1d" and name == "transposed":
        pytest.skip("Conv1D itself refuses it")
    torch.manual_seed(0)
    x = INPUTS[name]().to(dtype)
    adapter = make("linear" if kind == "no bias" else kind, bias=kind != "no bias", dtype=dtype)
    given = compare(adapter, x.requires_grad_(), tolerance)
    assert given["out"].shape == (*x.shape[:-1], D_OUT) and given["lam"] is not None


@pytest.mark.parametrize("trained", ["P", "lam", "Q", "P lam", "P Q", "lam Q", "x", ""])
def test_only_the_gradients_asked_for_are_given(trained):
    adapter = make()
    for name in ("P", "lam", "Q"):
        getattr(adapter, name).requires_grad_(name in trained)
    x = torch.randn(4, D_IN, dtype=torch.float64, requires_grad="x" in trained)
    if trained:
        given = compare(adapter, x, 1e-12)
        assert {name for name in given if given[name] is not None} == {"out", *trained.split()}
    else:
        assert not adapter(x).requires_grad


def test_lora_keeps_its_fixed_lambda():
    given = compare(make(init="lora"), torch.randn(4, D_IN, dtype=torch.float64, requires_grad=True), 1e-12)
    assert given["lam"] is None and given["P"] is not None


@pytest.mark.parametrize("needs_x", [True, False])
def test_dropout_is_of_what_the_adapter_sees(needs_x):
    adapter = make(dropout=0.5)
    x = torch.randn(2, 8, D_IN, dtype=torch.float64, requires_grad=needs_x)
    compare(adapter, x, 1e-12)
    torch.manual_seed(0)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.dropout.eval()
    assert torch.equal(adapter(x), adapter(x))
    compare(adapter, x, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32-bit base", "16-bit base"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autocast(dtype, dropout):
    def under_autocast(one, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return one(x)

    adapter = make(dtype=torch.float32, base_dtype=dtype, dropout=dropout)
    x = torch.randn(2, 5, D_IN, requires_grad=True)
    given = compare(adapter, x, 0.05, call=under_autocast)
    assert given["out"].dtype == torch.bfloat16 and given["P"].dtype == given["x"].dtype == torch.float32
    exact = make(dtype=torch.float64)
    assert not is_fused(under_autocast(exact, x.double()))
    torch.testing.assert_close(under_autocast(exact, x.double()), exact(x.double()), rtol=1e-12, atol=1e-12)


def test_a_backward_pass_inside_autocast_computes_as_outside():
    adapter, x = make(dtype=torch.float32), torch.randn(4, D_IN, requires_grad=True)
    outside = run(adapter, x)
    x.grad, adapter.P.grad = None, None
    out = adapter(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.backward(grad)
    assert torch.equal(x.grad, outside["x"])
    torch.testing.assert_close(adapter.P.grad, outside["P"], rtol=0.02, atol=0.02)  # P's own products were cast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_throughout(dtype):
    compare(make(dtype=dtype), torch.randn(2, 5, D_IN).to(dtype).requires_grad_(), 0.05)


def test_types_that_differ_take_the_plain_path():
    adapter = make(dtype=torch.float32, base_dtype=torch.bfloat16)
    x = torch.randn(2, 5, D_IN, dtype=torch.bfloat16, requires_grad=True)
    assert compare(adapter, x, 0.0, wanted=False)["out"].dtype == torch.bfloat16


class Other(nn.Linear):
    """Inherits nn.Linear's forward, but may mean something else by calling it."""


class Shifted(nn.Module):
    def forward(self, weight):
        return weight + 1


def hooked(adapter):
    adapter.base_layer.register_forward_hook(lambda _module, _inputs, out: out + 1)


def hooked_before(adapter):
    adapter.base_layer.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1,))


def hooked_backward(adapter):
    adapter.base_layer.register_full_backward_hook(lambda _module, grad_in, _grad_out: (grad_in[0] * 2,))


def replaced_forward(adapter):
    forward = adapter.base_layer.forward
    adapter.base_layer.forward = lambda x: forward(x) + 1


def inherited(adapter):
    adapter.base_layer = Other(D_IN, D_OUT).double().requires_grad_(False)


def parametrized(adapter):
    parametrize.register_parametrization(adapter.base_layer, "weight", Shifted())
    adapter.base_layer.requires_grad_(False)


def trained_weight(adapter):
    adapter.base_layer.weight.requires_grad_(True)


def trained_bias(adapter):
    adapter.base_layer.bias.requires_grad_(True)


@pytest.mark.parametrize(
    "change",
    [
        hooked, hooked_before, hooked_backward, replaced_forward, inherited, parametrized, trained_weight,
        trained_bias, nn.Module.eval,
    ],
)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_layer_that_is_more_than_a_product_is_called(change, kind):
    if kind == "conv1d" and change is inherited:
        pytest.skip("Conv1D is known by its name")
    adapter = make(kind)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64, requires_grad=True)
    assert is_fused(adapter(x))
    change(adapter)
    delta = (adapter.P * adapter.lam * adapter.scaling) @ adapter.Q
    out = adapter(x)
    assert not is_fused(out)
    torch.testing.assert_close(out, adapter.base_layer(x) + x @ delta.T, rtol=1e-12, atol=1e-12)
    out.sum().backward()
    for trained in adapter.base_layer.parameters():
        assert (trained.grad is not None) == trained.requires_grad


def test_a_hook_on_every_module_sees_the_base_layer():
    adapter, x, called = make(), torch.ones(2, D_IN, dtype=torch.float64), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, _inputs, _out: called.append(module))
    try:
        assert not is_fused(adapter(x))
    finally:
        handle.remove()
    assert adapter.base_layer in called and is_fused(adapter(x))


def test_one_row_without_a_batch_and_a_wrong_width():
    adapter = make()
    compare(adapter, torch.randn(D_IN, dtype=torch.float64, requires_grad=True), 1e-12, wanted=False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        adapter(torch.randn(2, 2 * D_IN, dtype=torch.float64))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    adapter, x = make(), torch.randn(4, D_IN, dtype=torch.float64)
    expected = adapter(x).detach()
    with context():
        assert torch.equal(adapter(x), expected)


@pytest.mark.parametrize("dropped", [False, True])
def test_gradients_and_second_derivatives_are_those_of_finite_differences(dropped):
    from rankalloc.layers.fused import Layer, fused_linear

    adapter = make()
    base = adapter.base_layer
    x, seen = (torch.randn(2, 2, D_IN, dtype=torch.float64, requires_grad=True) for _ in range(2))
    factors = (adapter.P, adapter.lam, adapter.Q)

    def function(x, seen, *factors):
        return fused_linear([Layer(base, "linear", factors, 0.7)], x, torch.float64, seen if dropped else None)[0]

    inputs = (x, seen if dropped else seen.detach(), *factors)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    if dropped:
        assert torch.autograd.gradcheck(function, (x, seen.detach(), *factors))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing(reentrant, dropout):
    adapter = make(dropout=dropout)
    x = torch.randn(4, D_IN, dtype=torch.float64)
    kept = run(adapter, x.clone().requires_grad_())
    again = run(
        adapter, x.clone().requires_grad_(), call=lambda value: checkpoint(adapter, value, use_reentrant=reentrant)
    )
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_compiled_without_a_break():
    torch.compiler.reset()
    adapter, graphs = make(), []

    def backend(graph, _inputs):
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(adapter, fullgraph=True, backend=backend)
    x = torch.randn(4, D_IN, dtype=torch.float64)
    given = run(adapter, x.clone().requires_grad_(), call=compiled)
    assert len(graphs) == 1 and "autograd_function" not in graphs[0]  # the plain formula, the compiler's to fuse
    eager = run(adapter, x.clone().requires_grad_())
    for name, value in eager.items():
        torch.testing.assert_close(given[name], value, rtol=1e-12, atol=1e-12)


def test_functional_call_uses_the_weights_it_is_given():
    adapter, other = make(), make()
    for parameter in other.parameters():
        parameter.data.normal_()
    weights = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in other.named_parameters()}
    x = torch.randn(4, D_IN, dtype=torch.float64)
    out = torch.func.functional_call(adapter, weights, (x,))
    assert is_fused(out) and torch.equal(out, other(x))
    out.sum().backward()
    assert weights["P"].grad is not None and adapter.P.grad is None


def test_function_transforms():
    adapter = make()
    factors = {name: p.detach() for name, p in adapter.named_parameters() if p.requires_grad}
    x = torch.randn(5, 2, D_IN, dtype=torch.float64)

    def loss(factors, x):
        return torch.func.functional_call(adapter, factors, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(factors, x)
    for index in range(len(x)):
        adapter.zero_grad()
        adapter(x[index]).square().sum().backward()
        for name in factors:
            grad = adapter.get_parameter(name).grad
            torch.testing.assert_close(per_sample[name][index], grad, rtol=1e-10, atol=1e-10)


def test_the_output_may_be_changed_in_place():
    x = torch.randn(2, 4, D_IN, dtype=torch.float64, requires_grad=True)
    compare(make(), x, 1e-12, call=lambda one, value: torch.relu_(one(value)))


def test_weights_changed_between_forward_and_backward_are_noticed():
    adapter = make()
    out = adapter(torch.randn(4, D_IN, dtype=torch.float64))
    with torch.no_grad():
        adapter.Q.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_is_remembered_across_a_shrink():
    """Training through allocations and the removal of ranks ends where the plain formula ends."""
    def trained(watched):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
        adapters = ra.attach(model, rank=4)
        for adapter in adapters:
            for factor in (adapter.P, adapter.lam, adapter.Q):
                factor.data = factor.data.double()
            if watched:
                adapter.base_layer.register_forward_hook(lambda *_: None)
        optimizer = torch.optim.SGD(adapters.parameters(), lr=0.05)
        for step in range(6):
            if step == 3:
                prune(adapters, [1, 2])
            x = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(4, 8)
            loss = (model(x) - torch.sin(3 * x)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach(), [adapter.delta_weight() for adapter in adapters]

    fused, reference = trained(False), trained(True)
    torch.testing.assert_close(fused, reference, rtol=1e-11, atol=1e-11)
    assert all(delta.any() for delta in fused[1])


class Counter(TorchDispatchMode):
    """Counts the operators that compute, and the new tensors of at least ``size`` numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.calls, self.large, self.storages = size, [], 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls.append(str(func))
            if isinstance(out, torch.Tensor) and out.numel() >= self.size:
                pointer = out.untyped_storage().data_ptr()
                self.large += pointer not in self.storages
                self.storages.add(pointer)
        return out


def test_no_temporary_of_the_activations_size():
    rows = 400
    adapter = make()
    x = torch.randn(2, rows // 2, D_IN, dtype=torch.float64, requires_grad=True)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, Counter(rows * D_IN) as forward:
        out = adapter(x)
    assert len(forward.calls) <= 8, forward.calls
    assert forward.large == 1  # the output
    activations = {t.untyped_storage().data_ptr(): t for t in saved if t.shape[0] == rows or t.dim() > 2}
    assert sorted(t.shape[-1] for t in activations.values()) == [RANK + 1, D_IN]  # z with the bias's ones, and x
    grad = torch.randn_like(out)
    with Counter(rows * D_IN) as backward:
        out.backward(grad)
    assert backward.large == 1, backward.calls  # the gradient of x
    with Counter(rows * D_IN) as reference:
        plain(adapter)(x).backward(grad)
    assert reference.large > 4
