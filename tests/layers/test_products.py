"""Products of frozen weights by oneDNN: the plain formula's numbers wherever they are taken, and when they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rankalloc as ra
from rankalloc.layers import products
from rankalloc.layers.fused import Layer, fused_linear
from rankalloc.training.environment import describe
from tests.support.fused import INPUTS, compare, make, plain, run
from tests.support.models import make_mlp, prune
from tests.support.training import controlled_mlp, train_mlp, trained_llama

OPERATOR = "mkldnn::_linear_pointwise"
decide = products.uses_onednn

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def _taken(monkeypatch):
    """oneDNN for products of every size, on every processor."""
    monkeypatch.setattr(products, "uses_onednn", lambda: True)
    monkeypatch.setattr(products, "_SMALLEST", 1)


def by_onednn(function) -> int:
    """How many products oneDNN computes."""
    with torch.profiler.profile() as profile:
        function()
    return sum(event.name.startswith(OPERATOR) for event in profile.events())


@pytest.mark.parametrize("rows", ["as they are", "expanded", "every second", "turned round"])
@pytest.mark.parametrize("layout", ["as it is", "turned round", "part of a wider one", "every second"])
def test_any_layout(layout, rows):
    torch.manual_seed(0)
    weight = {
        "as it is": lambda: torch.randn(80, 100), "turned round": lambda: torch.randn(100, 80).t(),
        "part of a wider one": lambda: torch.randn(80, 200)[:, :100],
        "every second": lambda: torch.randn(160, 200)[::2, ::2],
    }[layout]()
    x = {
        "as they are": lambda: torch.randn(64, 100), "expanded": lambda: torch.randn(1, 1).expand(64, 100),
        "every second": lambda: torch.randn(64, 200)[:, ::2], "turned round": lambda: torch.randn(100, 64).t(),
    }[rows]()
    bias, other = torch.randn(80), torch.randn(64, 80)
    expected = x.double() @ weight.double().t()
    for found, added in (
        (products.product(x, weight), 0), (products.product(x, weight, bias), bias),
        (products.product_plus(x, weight, other), other),
    ):
        torch.testing.assert_close(found.double(), expected + added, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_the_numbers_are_the_plain_formulas(kind, name):
    if kind == "conv1d" and name == "transposed":
        pytest.skip("Conv1D itself refuses it")
    torch.manual_seed(0)
    x = INPUTS[name]().requires_grad_()
    adapter = make("linear" if kind == "no bias" else kind, bias=kind != "no bias", dtype=torch.float32)
    compare(adapter, x, 1e-5)
    assert by_onednn(lambda: run(adapter, x)) == (2 if x.numel() else 0)  # x Wᵀ and ∂y W


@pytest.mark.parametrize("init", ["svd", "lora", "lora-fa"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("needs_x", [True, False])
def test_what_is_trained_and_what_is_dropped(init, dropout, needs_x):
    adapter = make(init=init, dtype=torch.float32, dropout=dropout)
    x = torch.randn(2, 8, 6, requires_grad=needs_x)
    compare(adapter, x, 1e-5)
    assert by_onednn(lambda: run(adapter, x)) == 1 + needs_x


def test_layers_that_share_their_input():
    torch.manual_seed(0)
    layers, x = [], torch.randn(9, 12, requires_grad=True)
    for d_out, rank, bias in ((10, 4, True), (8, 1, False), (5, 3, True)):
        base = nn.Linear(12, d_out, bias=bias).requires_grad_(False)
        factors = tuple(torch.randn(shape, requires_grad=True) for shape in ((d_out, rank), (rank,), (rank, 12)))
        layers.append(Layer(base, "linear", factors, 0.5))
    leaves = [x, *(factor for layer in layers for factor in layer.factors)]

    def together():
        outs = fused_linear(layers, x, torch.float32)
        return [*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)]

    outs = [one.base(x) + 0.5 * x @ one.factors[2].t() @ (one.factors[0] * one.factors[1]).t() for one in layers]
    expected = [*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)]
    for found, wanted in zip(together(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert by_onednn(together) == 6


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_second_derivatives(dropout):
    adapter, found = make(dtype=torch.float32, dropout=dropout), []
    for one in (adapter, plain(adapter)):
        torch.manual_seed(0)
        x = torch.randn(6, 6, requires_grad=True)
        leaves = [x, one.P, one.lam, one.Q]
        first = torch.autograd.grad(one(x).square().sum(), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    adapter, x = make(dtype=torch.float32), torch.randn(4, 6)
    kept = run(adapter, x.clone().requires_grad_())
    again = run(
        adapter, x.clone().requires_grad_(), call=lambda value: checkpoint(adapter, value, use_reentrant=reentrant)
    )
    assert all(torch.equal(again[name], kept[name]) for name in kept)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_a_layer_without_triplets_is_multiplied_alike_and_keeps_nothing(kind):
    adapter = make("linear" if kind == "no bias" else kind, bias=kind != "no bias", dtype=torch.float32)
    adapter.resize(0)
    x = torch.randn(2, 5, 6, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = adapter(x)
    assert [t.numel() for t in kept] == [60] and out.is_contiguous()  # W alone
    base = adapter.base_layer
    torch.testing.assert_close(out, base(x), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (wanted,) = torch.autograd.grad(base(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-4)
    again, expected = (torch.autograd.grad(g.square().sum(), x)[0] for g in (grad, wanted))
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-3)
    assert by_onednn(lambda: adapter(x).sum().backward()) == 2
    assert all(p.grad is None for p in (adapter.P, adapter.lam, adapter.Q))
    assert by_onednn(lambda: adapter.eval()(x)) == 0
    with pytest.raises(RuntimeError):
        adapter.train()(torch.randn(2, 12))


def test_a_layer_without_triplets_is_called_where_it_is_more_than_a_product():
    adapter, x = make(dtype=torch.float32), torch.randn(4, 6)
    adapter.resize(0)
    adapter.base_layer.register_forward_hook(lambda _module, _inputs, out: out + 1)
    assert by_onednn(lambda: adapter(x)) == 0 and torch.equal(adapter(x), adapter.base_layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapter(x).dtype == torch.bfloat16
    assert make()(x.double()).dtype == torch.float64


def test_what_is_left_to_torch(monkeypatch):
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    assert products.chosen(x, [weight])
    assert not products.chosen(x.double(), [weight.double()]) and not products.chosen(x.bfloat16(), [weight])
    assert not products.chosen(x[:0], [weight])
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products.chosen(x, [weight])
    monkeypatch.setattr(products, "_SMALLEST", 4 * 6 * 5)
    assert products.chosen(x, [weight]) and not products.chosen(x, [weight, weight[:4]])
    monkeypatch.setattr(products, "uses_onednn", lambda: False)
    assert not products.chosen(x, [weight])


@pytest.mark.parametrize(
    "switch, name, wide, expected",
    [
        (None, "AMD EPYC", True, "oneDNN"), (None, "AMD EPYC", False, "torch"), (None, "Intel Xeon", True, "torch"),
        (None, "", True, "torch"), ("0", "AMD EPYC", True, "torch"), ("1", "Intel Xeon", False, "oneDNN"),
    ],
)
def test_the_processor_and_the_switch_decide(switch, name, wide, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name, "avx512_f": wide}, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(products, "uses_onednn", decide.__wrapped__)
    monkeypatch.delenv(products.SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(products.SWITCH, switch)
    record = describe("cpu")
    assert (record.products, record.processor) == (expected, name or None)
    assert describe("cuda:0" if torch.cuda.is_available() else "meta").products == "torch"


def test_a_run_with_siblings_and_shrinking_equals_itself_and_torch_s(monkeypatch):
    losses, weights, ranks = trained_llama()
    again = trained_llama()
    assert losses == again[0] and all(torch.equal(weights[name], again[1][name]) for name in weights)
    monkeypatch.setattr(products, "uses_onednn", lambda: False)
    other = trained_llama()
    assert losses == pytest.approx(other[0], rel=1e-4) and losses != other[0] and ranks == other[2]


def test_a_run_that_goes_on_with_other_products_says_so(monkeypatch, caplog):
    model, controller = controlled_mlp()
    train_mlp(model, controller, torch.optim.AdamW(controller.adapters.parameters(), lr=1e-2), 2)
    state = controller.state_dict()
    for taken, alerts in ((True, 0), (False, 1)):
        monkeypatch.setattr(products, "uses_onednn", lambda taken=taken: taken)
        other, again = controlled_mlp()
        other.load_state_dict(model.state_dict())
        again.load_state_dict(state)
        assert len(again.trace.alerts) == alerts
    assert "began with products by oneDNN and goes on with products by torch" in caplog.text
    assert f"{products.SWITCH}=1" in again.trace.alerts[0]


def test_a_pruned_model_gives_what_it_gave():
    model = make_mlp().train()
    adapters = ra.attach(model, rank=4)
    for adapter in adapters:
        nn.init.normal_(adapter.lam)
    prune(adapters, [0, 3, 4])
    x = torch.randn(8, next(iter(adapters)).d_in)
    torch.testing.assert_close(model(x), model.eval()(x), rtol=1e-5, atol=1e-5)
