"""The adapter's algebra: ΔW = s · P Λ Q, its singular values, and how it drops and resizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from rankalloc.adapters.adapter import Adapter
from rankalloc.adapters.triplets import replace_data


def layer(kind: str) -> nn.Module:
    return nn.Linear(6, 10) if kind == "linear" else Conv1D(10, 6)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("init", ["svd", "lora"])
def test_a_new_adapter_changes_nothing(kind, init):
    base = layer(kind)
    adapter = Adapter(base, rank=4, scaling=2.0, init=init)
    x = torch.randn(3, 5, 6)
    assert torch.equal(adapter(x), base(x))
    assert (adapter.d_in, adapter.d_out, adapter.params_per_rank, adapter.kind) == (6, 10, 16, kind)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_forward_is_the_formula(kind):
    base = layer(kind)
    adapter = Adapter(base, rank=4, scaling=0.7)
    for p in (adapter.P, adapter.lam, adapter.Q):
        nn.init.normal_(p.data)
    x = torch.randn(3, 6, dtype=torch.float64)
    adapter, weight = adapter.double(), (base.weight.T if kind == "conv1d" else base.weight).double()
    delta = 0.7 * adapter.P @ torch.diag(adapter.lam) @ adapter.Q
    expected = F.linear(x, weight + delta, base.bias.double())
    torch.testing.assert_close(adapter(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.delta_weight(), delta.detach(), rtol=1e-12, atol=1e-12)


def test_initialisations_are_those_of_the_papers():
    torch.manual_seed(0)
    svd = Adapter(nn.Linear(400, 300), rank=50, scaling=1.0)
    assert not svd.lam.any() and svd.lam.requires_grad
    assert abs(svd.P.std().item() - 0.02) < 5e-4 and abs(svd.Q.std().item() - 0.02) < 5e-4
    lora = Adapter(nn.Linear(400, 300), rank=50, scaling=1.0, init="lora")
    assert not lora.P.any() and (lora.lam == 1).all() and not lora.lam.requires_grad
    assert lora.Q.abs().max() <= 400**-0.5 and lora.Q.std() > 0.5 * 400**-0.5


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_singular_values_are_those_of_the_update(rank):
    adapter = Adapter(nn.Linear(6, 10), rank=rank, scaling=1.3)
    for p in (adapter.P, adapter.lam, adapter.Q):
        nn.init.normal_(p.data)
    values = adapter.singular_values()
    expected = torch.linalg.svdvals(adapter.delta_weight().double())[:rank]
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    assert (values[:-1] >= values[1:]).all()


def test_dropped_triplets_stop_acting_keep_their_vectors_and_may_come_back():
    adapter = Adapter(nn.Linear(6, 10), rank=3, scaling=1.0)
    for p in (adapter.P, adapter.lam, adapter.Q):
        nn.init.normal_(p.data)
    p_before, lam_before = adapter.P.clone(), adapter.lam.clone()
    adapter.drop(torch.tensor([True, False, True]))
    assert adapter.live_rank == 2 and adapter.rank == 3
    assert torch.equal(adapter.P, p_before)
    assert torch.equal(adapter.lam, lam_before * torch.tensor([1.0, 0.0, 1.0]))
    adapter(torch.randn(2, 6)).sum().backward()
    assert adapter.lam.grad[1] != 0
    adapter.drop(torch.tensor([True, True, False]))
    assert adapter.kept.tolist() == [True, True, False]


def test_a_smaller_checkpoint_loads_into_a_fresh_adapter():
    small, fresh = Adapter(nn.Linear(6, 10), 2, 1.0), Adapter(nn.Linear(6, 10), 5, 1.0)
    nn.init.normal_(small.lam.data)
    names = {id(p) for p in fresh.parameters()}
    fresh.load_state_dict(small.state_dict())
    assert fresh.rank == fresh.live_rank == 2 and {id(p) for p in fresh.parameters()} == names
    x = torch.randn(3, 6)
    assert torch.equal(fresh(x), small(x))


@pytest.mark.parametrize("rank", [0, 2])
def test_parameters_change_shape_while_an_old_graph_is_held(rank):
    adapter = Adapter(nn.Linear(6, 10), 4, 1.0)
    held = adapter(torch.randn(2, 6)).sum()
    held.backward(retain_graph=True)
    replace_data(adapter.P, adapter.P.data[:, :rank].clone())
    replace_data(adapter.lam, adapter.lam.data[:rank].clone())
    replace_data(adapter.Q, adapter.Q.data[:rank].clone())
    adapter.kept = adapter.kept[:rank]
    out = adapter(torch.randn(2, 6)).sum()
    if rank:
        out.backward()
        assert adapter.P.grad.shape == (10, rank) and adapter.Q.grad.shape == (rank, 6)
    else:
        assert not out.requires_grad or adapter.P.grad is None
    assert held.grad_fn is not None


def test_rank_zero_is_the_base_layer():
    base = nn.Linear(6, 10)
    adapter = Adapter(base, 0, 1.0)
    x = torch.randn(2, 6)
    assert torch.equal(adapter(x), base(x))
    assert adapter.singular_values().numel() == 0 and not adapter.delta_weight().any()


def test_dropout_acts_on_the_adapters_input_only_while_training():
    base = nn.Linear(6, 10)
    adapter = Adapter(base, 4, 1.0, dropout=0.5)
    nn.init.normal_(adapter.lam.data, mean=50.0)
    x = torch.ones(64, 6)
    adapter.eval()
    torch.testing.assert_close(adapter(x)[0], adapter(x)[-1])
    adapter.train()
    assert not torch.allclose(adapter(x)[0], adapter(x)[-1])
    adapter.lam.data.zero_()
    assert torch.equal(adapter(x), base(x))


def test_half_precision_base_keeps_its_output_type():
    adapter = Adapter(nn.Linear(6, 10).bfloat16(), 2, 1.0)
    assert adapter.P.dtype == torch.float32
    assert adapter(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16
