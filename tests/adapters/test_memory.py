"""Taking dropped triplets out of memory: same function, same objects, a working optimizer."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import rankalloc as ra
from rankalloc.adapters import memory, optimizer_state
from rankalloc.errors import NotAdaptedError, RankallocError
from tests.support.models import make_mlp
from tests.support.optimizers import OPTIMIZERS

KEEP = {"0": [1, 3], "2": [], "4": [0, 1, 2, 3]}


def step(model, optimizer, seed):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    F.mse_loss(model(x), x[:, :8].sin()).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(make):
    model = make_mlp()
    torch.manual_seed(1)
    adapters = ra.attach(model, rank=4)
    optimizer = make(adapters.parameters())
    for seed in range(3):
        step(model, optimizer, seed)
    for name, adapter in adapters.modules.items():
        adapter.drop(torch.tensor([i in KEEP[name] for i in range(4)]))
    return model, adapters, optimizer


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_function_and_objects_stay_and_training_goes_on(make):
    model, adapters, optimizer = trained(make)
    before_objects = [id(p) for p in adapters.parameters()]
    x = torch.randn(6, 16)
    before = model(x).detach()
    held = model(x).sum()  # a graph someone still holds on to
    optimizer_state.require_support(adapters, optimizer, ["select"])
    memory.shrink(adapters, optimizer)
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-6, atol=1e-6)
    assert [id(p) for p in adapters.parameters()] == before_objects
    assert {n: (a.P.shape[1], len(a.lam), a.Q.shape[0], len(a.kept)) for n, a in adapters.modules.items()} == {
        n: (len(k),) * 4 for n, k in KEEP.items()
    }
    p_before = adapters.modules["4"].P.detach().clone()
    for seed in range(3, 6):
        step(model, optimizer, seed)
    assert not torch.equal(adapters.modules["4"].P, p_before)
    assert all(torch.isfinite(p).all() for p in adapters.parameters())
    assert held.grad_fn is not None


ELEMENTWISE = [name for name in OPTIMIZERS if "adafactor" not in name]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_training_goes_on_exactly_as_with_dropped_triplets_held_at_zero(name):
    """Optimizers that treat each entry alone cannot tell the two apart."""
    held_model, held, held_optimizer = trained(OPTIMIZERS[name])
    model, adapters, optimizer = trained(OPTIMIZERS[name])
    memory.shrink(adapters, optimizer)
    for seed in range(3, 8):
        step(model, optimizer, seed)
        step(held_model, held_optimizer, seed)
        for adapter in held:
            adapter.drop(adapter.kept)
    for adapter, twin in zip(adapters, held, strict=True):
        torch.testing.assert_close(adapter.P, twin.P[:, twin.kept], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(adapter.lam, twin.lam[twin.kept], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(adapter.Q, twin.Q[twin.kept], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_state_belongs_to_the_triplet_it_belonged_to(name):
    model, adapters, optimizer = trained(OPTIMIZERS[name])
    before = {
        id(p): {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        for p in adapters.parameters()
    }
    memory.shrink(adapters, optimizer)
    checked = 0
    for layer, adapter in adapters.modules.items():
        index = torch.tensor(KEEP[layer], dtype=torch.long)
        for parameter, dim in ((adapter.P, 1), (adapter.lam, 0), (adapter.Q, 0)):
            for key, value in optimizer.state[parameter].items():
                if not isinstance(value, torch.Tensor) or value.dim() == 0:
                    continue
                old = before[id(parameter)][key]
                axes = [axis for axis in range(old.dim()) if old.shape[axis] == 4]
                if value.shape == parameter.shape and old.dim() == parameter.dim() and old.shape[dim] == 4:
                    expected = old.index_select(dim, index)
                else:
                    expected = old.index_select(axes[0], index) if axes else old
                assert torch.equal(value, expected), (layer, key)
                checked += 1
    assert checked or name == "sgd"


def test_nothing_changes_when_an_optimizers_state_cannot_be_sliced():
    model, adapters, optimizer = trained(OPTIMIZERS["adamw"])
    optimizer.state[adapters.modules["4"].Q]["sketch"] = torch.zeros(5, 5)
    optimizer.state[adapters.modules["0"].Q]["sketch"] = torch.zeros(5, 5)
    with pytest.raises(RankallocError, match=r"AdamW keeps sketch of shape \(5, 5\).*shrink=False"):
        optimizer_state.require_support(adapters, optimizer, ["select"])
    with pytest.raises(RankallocError):
        memory.shrink(adapters, optimizer)
    assert {a.rank for a in adapters} == {4}
    optimizer_state.require_support(adapters, optimizer, [])


def test_an_optimizer_that_holds_other_parameters_is_told_at_once():
    model = make_mlp()
    early = torch.optim.AdamW(model.parameters(), lr=1e-3)
    adapters = ra.attach(model, rank=4)
    for shrink in (True, False):
        controller = observed(ra.RankController(adapters, ra.RankBudget(ranks=5), 10, shrink=shrink))
        with pytest.raises(NotAdaptedError, match="after rankalloc.attach"):
            controller.update(early)
    with pytest.raises(NotAdaptedError, match=r"controller\.update\(optimizer\)"):
        observed(ra.RankController(adapters, ra.RankBudget(ranks=5), 10)).update(None)
    with pytest.raises(NotAdaptedError, match="canonical=False"):
        observed(ra.RankController(adapters, ra.RankBudget(ranks=5), 10, shrink=False)).update(None)
    observed(ra.RankController(adapters, ra.RankBudget(ranks=5), 10, shrink=False, canonical=False)).update(None)


def observed(controller):
    """The controller after a backward pass."""
    controller.adapters.model(torch.randn(8, 16)).square().mean().backward()
    controller.observe()
    return controller


def test_wrapped_optimizers_are_unwrapped():
    from accelerate import Accelerator

    model, adapters, optimizer = trained(OPTIMIZERS["adamw"])
    wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer)
    assert wrapped is not optimizer
    optimizer_state.require_support(adapters, wrapped, ["select", "turn", "forget"])
    memory.shrink(adapters, wrapped)
    assert optimizer.state[adapters.modules["0"].P]["exp_avg"].shape == (24, 2)
    step(model, wrapped, 9)
