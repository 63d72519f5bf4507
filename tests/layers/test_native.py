"""The compiled kernel, built here for real: the Python function's numbers in every shape, and all works without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import rankalloc as ra
from rankalloc.cli.app import app
from rankalloc.layers import native, products
from rankalloc.layers.fused import Layer, _FusedLinear, fused_linear
from tests.support.fused import INPUTS, make, run
from tests.support.models import make_mlp
from tests.support.training import controlled_mlp, train_mlp, trained_llama

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="the kernel is built by g++ on Linux"
)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """Where the kernel lies, built once; pytest's cache keeps it, as a build takes half a minute.

    The library's name holds what it was made from, so one of other sources or another torch is never taken.
    """
    cache = getattr(request.config, "cache", None)  # absent with -p no:cacheprovider
    path = cache.mkdir("kernel") if cache else tmp_path_factory.mktemp("kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(path))
        native.build()
    return path


@pytest.fixture
def kernel(folder, monkeypatch):
    """The kernel in use, as in a process that finds it built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    monkeypatch.setenv(native.SWITCH, "1")
    find = native.fused_linear  # tests replace it
    find.cache_clear()
    yield find()
    monkeypatch.setenv(native.SWITCH, "0")
    find.cache_clear()


@pytest.fixture(params=["torch", "oneDNN"])
def library(request, monkeypatch):
    """Who multiplies by the frozen weights."""
    if request.param == "oneDNN" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(products, "uses_onednn", lambda: request.param == "oneDNN")
    monkeypatch.setattr(products, "_SMALLEST", 1)
    return request.param


def layer(d_in, d_out, rank, bias=True, scaling=0.7) -> Layer:
    base = nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)
    factors = tuple(torch.randn(shape).requires_grad_() for shape in ((d_out, rank), (rank,), (rank, d_in)))
    return Layer(base, "linear", factors, scaling)


def both(layers, x, dropped=None):
    """Outputs and gradients of the kernel and, in float64, of the Python function."""
    outs = fused_linear(layers, x, torch.float32, dropped)
    assert "CppNode" in outs[0].grad_fn.name()
    grads = [torch.randn(out.shape) for out in outs]
    leaves = [t for t in (x, dropped, *(f for one in layers for f in one.factors)) if t is not None and t.requires_grad]
    found = [*outs, *torch.autograd.grad(outs, leaves, grads)]
    wide = {id(t): t.detach().double().requires_grad_() for t in leaves}
    exact = [wide.get(id(t), t.detach().double() if t is not None else None) for t in (x, dropped)]
    for one in layers:
        bias = None if one.base.bias is None else one.base.bias.double()
        exact += [one.base.weight.double(), bias, *(wide[id(f)] for f in one.factors)]
    outs = _FusedLinear.apply([one.scaling for one in layers], False, *exact)
    wanted = [*outs, *torch.autograd.grad(outs, list(wide.values()), [grad.double() for grad in grads])]
    return found, wanted


def assert_close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        scale = other.abs().max().item() if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-6 * max(1.0, scale))


@pytest.mark.parametrize("rank", [1, 2, 7, 12, 13, 40])
@pytest.mark.parametrize("d_in, d_out, rows", [(6, 10, 5), (65, 33, 70), (40, 600, 130), (600, 40, 200), (16, 48, 64)])
def test_the_numbers_are_those_of_the_python_function(kernel, library, d_in, d_out, rows, rank):
    for bias in (True, False):
        assert_close(*both([layer(d_in, d_out, rank, bias)], torch.randn(rows, d_in, requires_grad=True)))


@pytest.mark.parametrize("laid_out", ["columns after one another", "part of a wider one"])
def test_weights_of_any_layout(kernel, library, laid_out):
    one = layer(40, 24, 5)
    weight = one.base.weight.detach()
    other = weight.t().contiguous().t() if laid_out[0] == "c" else torch.cat([weight, weight], dim=1)[:, :40]
    assert not other.is_contiguous()
    one.base.weight = nn.Parameter(other, requires_grad=False)
    assert_close(*both([one], torch.randn(100, 40, requires_grad=True)))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_what_the_adapter_sees_may_be_another_tensor(kernel, library, needs):
    x, dropped = (torch.randn(70, 20, requires_grad=need) for need in needs)
    assert_close(*both([layer(20, 30, 5)], x, dropped))


def test_the_products_are_those_of_the_library(kernel, library):
    def operators() -> set[str]:
        with torch.profiler.profile() as profile:
            assert_close(*both([layer(40, 600, 5)], torch.randn(100, 40, requires_grad=True)))
        return {event.name for event in profile.events()}

    assert any(name.startswith("mkldnn::_linear_pointwise") for name in operators()) == (library == "oneDNN")


def test_layers_that_share_their_input(kernel, library):
    layers = [layer(40, 24, 12), layer(40, 24, 3, bias=False), layer(40, 70, 14)]
    assert_close(*both(layers, torch.randn(90, 40, requires_grad=True)))
    assert_close(*both(layers, torch.randn(90, 40)))
    x = torch.randn(90, 40, requires_grad=True)
    outs = fused_linear(layers, x, torch.float32)
    outs[1].sum().backward()  # the others' outputs are used by nobody
    base, _, (p, lam, q), scaling = layers[1]
    expected = base.weight + scaling * (p * lam) @ q
    torch.testing.assert_close(x.grad, expected.sum(0).expand(90, 40), rtol=1e-4, atol=1e-4)
    assert layers[0].factors[0].grad is None and layers[1].factors[0].grad is not None


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_inputs_of_every_kind(kernel, library, kind, name, monkeypatch):
    if kind == "conv1d" and name == "transposed":
        pytest.skip("Conv1D itself refuses it")
    adapter = make("linear" if kind == "no bias" else kind, bias=kind != "no bias", dtype=torch.float32)
    x = INPUTS[name]().requires_grad_()
    assert "CppNode" in adapter(x).grad_fn.name()
    given = run(adapter, x)
    given["x"], x.grad = given["x"].clone(), None
    monkeypatch.setattr(native, "fused_linear", lambda: None)
    expected = run(adapter, x)
    for what, value in expected.items():
        torch.testing.assert_close(given[what], value, rtol=1e-5, atol=1e-5)


def test_gradients_that_are_not_laid_out_like_outputs(kernel, library):
    one = layer(20, 30, 5)
    x = torch.randn(4, 6, 20, requires_grad=True)
    fused_linear([one], x, torch.float32)[0].transpose(0, 1).sum().backward()  # expanded, of stride 0
    expected = (one.base.weight + 0.7 * (one.factors[0] * one.factors[1]) @ one.factors[2]).sum(0)
    torch.testing.assert_close(x.grad, expected.expand(4, 6, 20), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", ["P", "lam", "P lam", "x"])
def test_gradients_nobody_asked_for_are_not_given(kernel, library, trained):
    adapter = make(dtype=torch.float32)
    for name in ("P", "lam"):
        getattr(adapter, name).requires_grad_(name in trained)
    x = torch.randn(4, 6, requires_grad="x" in trained)
    given = run(adapter, x)
    assert {name for name in given if given[name] is not None} == {"out", "Q", *trained.split()}


def test_a_fixed_q_and_other_types_are_left_to_python(kernel):
    x = torch.randn(4, 6, requires_grad=True)
    assert "CppNode" not in make(init="lora-fa", dtype=torch.float32)(x).grad_fn.name()
    assert "CppNode" not in make()(x.double()).grad_fn.name()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make(dtype=torch.float32)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dropped", [False, True])
def test_second_derivatives(kernel, library, dropped, monkeypatch):
    one, found = layer(5, 7, 3), []
    x, seen = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    for function in (native.fused_linear, lambda: None):
        monkeypatch.setattr(native, "fused_linear", function)
        out = fused_linear([one], x, torch.float32, seen if dropped else None)[0]
        leaves = [x, *([seen] if dropped else []), *one.factors]
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kernel, library, reentrant):
    adapter, x = make(dtype=torch.float32), torch.randn(4, 6)
    kept = run(adapter, x.clone().requires_grad_())
    again = run(
        adapter, x.clone().requires_grad_(), call=lambda value: checkpoint(adapter, value, use_reentrant=reentrant)
    )
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_a_run_with_siblings_and_shrinking_equals_itself_and_python_s(kernel, library, monkeypatch):
    assert native.fused_linear() is not None  # on some processors it rounds exactly as Python's does
    losses, weights, ranks = trained_llama()
    again = trained_llama()
    assert losses == again[0] and all(torch.equal(weights[name], again[1][name]) for name in weights)
    monkeypatch.setattr(native, "fused_linear", lambda: None)
    other = trained_llama()
    assert losses == pytest.approx(other[0], rel=1e-4) and ranks == other[2]


def test_a_run_that_goes_on_with_other_sums_says_so(kernel, monkeypatch, caplog):
    model, controller = controlled_mlp()
    train_mlp(model, controller, torch.optim.AdamW(controller.adapters.parameters(), lr=1e-2), 2)
    state = controller.state_dict()
    for find, alerts in ((native.fused_linear, 0), (lambda: None, 1)):
        monkeypatch.setattr(native, "fused_linear", find)
        other, again = controlled_mlp()
        other.load_state_dict(model.state_dict())
        again.load_state_dict(state)
        assert len(again.trace.alerts) == len(caplog.records) == alerts
    assert "began with the compiled kernel and goes on with the python kernel" in caplog.text
    assert again.trace.alerts[0] in caplog.text and "rankalloc build-kernel" in caplog.text
    again.load_state_dict(again.state_dict())
    assert len(again.trace.alerts) == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_for_the_same_number_of_threads(kernel, library, threads):
    torch.set_num_threads(threads)
    try:
        one, x = layer(40, 600, 12), torch.randn(300, 40, requires_grad=True)
        found = [torch.autograd.grad(fused_linear([one], x, torch.float32)[0].square().sum(), [x, *one.factors])
                 for _ in range(3)]
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(1)


def test_nested_ranks(kernel, library):
    model = make_mlp().train()
    adapters = ra.attach(model, rank=4, init="lora")
    controller = ra.RankController(adapters, ra.RankBudget(ranks=9), 6, "dylora", seed=0)
    train_mlp(model, controller, torch.optim.AdamW(adapters.parameters(), lr=1e-2), 6)
    assert sum(adapters.ranks().values()) == 9


def test_shapes_that_do_not_fit_are_refused_before_memory_is_touched(kernel):
    adapter = make(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        adapter(torch.randn(2, 12))
    w, b, p, lam, q = torch.randn(4, 3), torch.randn(4), torch.randn(4, 2), torch.randn(2), torch.randn(2, 3)
    x = torch.randn(5, 3)
    for wrong in ([w, b, p[:3], lam, q], [w, b, p, lam, q[:1]], [w, b[:2], p, lam, q], [w, b, p, lam, q[:, :2]]):
        for onednn in (False, True):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                kernel(x, None, wrong, [1.0], onednn)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        kernel(x, x[:2], [w, b, p, lam, q], [1.0], False)
    with pytest.raises(RuntimeError, match="float32"):
        kernel(x, None, [w, b, p.double(), lam, q], [1.0], False)
    out = adapter(torch.randn(5, 6))
    adapter.resize(2)
    with pytest.raises(RuntimeError, match="changed between|shapes cannot|modified by an inplace"):
        out.sum().backward()


@pytest.mark.long
def test_a_damaged_library_is_told_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv(native.SWITCH, "1")
    native.library_path().parent.mkdir()
    native.library_path().write_bytes(b"no library")
    script = """
import torch
from rankalloc.adapters.adapter import Adapter
adapter = Adapter(torch.nn.Linear(6, 4).requires_grad_(False), rank=2, scaling=1.0)
print([adapter(torch.randn(2, 6)).shape for _ in range(2)])
"""
    # in a process of its own: in this one a kernel may be loaded already, which stays
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and "[2, 4]" in done.stdout
    assert done.stderr.count("build-kernel --force") == 1


def test_one_kernel_is_loaded_in_a_process_wherever_another_lies(kernel, tmp_path, monkeypatch):
    """torch ends a process in which a second library registers the same operator."""
    first = native.library_path()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    native.library_path().parent.mkdir()
    shutil.copy(first, native.library_path())
    native.fused_linear.cache_clear()
    assert native.fused_linear() is kernel


def test_the_command_the_switch_and_the_record(kernel, folder, monkeypatch):
    done = CliRunner().invoke(app, ["build-kernel"])
    assert done.exit_code == 0 and done.stdout.startswith("built already: ") and "RANKALLOC_NATIVE" not in done.stdout
    assert "compiled" in CliRunner().invoke(app, ["env"]).stdout
    monkeypatch.setenv(native.SWITCH, "0")
    native.fused_linear.cache_clear()
    assert native.fused_linear() is None
    assert "RANKALLOC_NATIVE=0" in CliRunner().invoke(app, ["build-kernel"]).stdout
    assert "python" in CliRunner().invoke(app, ["env"]).stdout
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert not native.library_path().exists()
    assert sorted(os.listdir(folder / "rankalloc")) == sorted(path.name for path in (folder / "rankalloc").glob("*.so"))
