"""Adapters that read one tensor: together they give what each gives alone, whoever comes and in whatever order."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rankalloc as ra
from rankalloc.layers.families import known
from tests.support.models import prune

D_IN, RANK = 6, 3


class Attention(nn.Module):
    """q, k and v of unlike widths and one without a bias, as grouped queries have; out reads another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D_IN, 8), nn.Linear(D_IN, 4, bias=False), nn.Linear(D_IN, 4)
        self.out = nn.Linear(4, D_IN)
        self.memory = None  # what k and v read instead
        self.calls = ("q", "k", "v")

    def forward(self, x):
        other = x if self.memory is None else self.memory
        made = {name: getattr(self, name)(x if name == "q" else other) for name in self.calls}
        mixed = sum(torch.tanh(y[..., :4] + y[..., -4:]) for y in made.values())
        return self.out(mixed)


def make(seed=0, **options) -> tuple[Attention, ra.Adapters]:
    torch.manual_seed(seed)
    model = Attention().double()
    adapters = ra.attach(model, rank=RANK, **options)
    for adapter in adapters:
        for factor in (adapter.P, adapter.lam, adapter.Q):
            factor.data = torch.randn_like(factor.data, dtype=torch.float64)
    return model, adapters


def plain(model: Attention) -> Attention:
    twin = copy.deepcopy(model)
    for name in ("q", "k", "v", "out"):
        getattr(twin, name).base_layer.register_forward_hook(lambda *_: None)
    return twin


def gradients(model, x, call=None):
    for parameter in model.parameters():
        parameter.grad = None
    x = x.detach().clone().requires_grad_()
    out = (call or model)(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def agree(model, x, call=None):
    """One more step of ``model`` gives what its plain twin gives."""
    for one, other in zip(gradients(model, x, call), gradients(plain(model), x), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def together(model, x) -> int:
    """The largest number of layers that one call computes."""
    counts, nodes = [0], [model(x).grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if "FusedLinear" in node.name():
            counts.append(len(node.scalings))
        nodes += [following for following, _ in node.next_functions]
    return max(counts)


def families(adapters) -> list[list[str]]:
    return known(adapters.modules)


X = torch.linspace(-1, 1, 10 * D_IN, dtype=torch.float64).reshape(2, 5, D_IN)


def test_siblings_meet_in_the_first_step_and_give_the_plain_formulas_numbers():
    model, adapters = make()
    assert families(adapters) == []
    agree(model, X)
    assert families(adapters) == [["q", "k", "v"], ["out"]]
    for _ in range(3):
        agree(model, X)
    assert together(model, X) == 3


@pytest.mark.parametrize("trained", [("P",), ("lam",), ("Q",), ("P", "Q"), ()])
def test_what_is_not_trained_gets_no_gradient(trained):
    model, _ = make()
    for name in ("P", "lam", "Q"):
        getattr(model.k, name).requires_grad_(name in trained)
    for _ in range(3):
        agree(model, X)
    assert together(model, X) == 3


def test_an_output_that_is_not_used_gets_no_gradient():
    model, _ = make()
    agree(model, X)
    model.zero_grad()
    x = X.clone().requires_grad_()
    q, k, v = model.q(x), model.k(x), model.v(x)
    (q.sum() + v.sum()).backward()
    assert k.grad_fn is q.grad_fn and model.k.P.grad is None and model.v.P.grad is not None


def test_first_and_second_derivatives_are_those_of_finite_differences():
    model, _ = make()
    model(X)
    factors = [p for adapter in (model.q, model.k, model.v) for p in (adapter.P, adapter.lam, adapter.Q)]

    def function(x, *_factors):
        return model.q(x), model.k(x), model.v(x)

    x = torch.randn(2, 2, D_IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *factors))
    assert torch.autograd.gradgradcheck(function, (x, *factors))
    assert together(model, x) == 3


def test_a_family_ends_when_one_comes_for_something_else():
    model, adapters = make()
    agree(model, X)
    model.memory = X.flip(0).clone()
    agree(model, X)
    assert families(adapters) == [["q"], ["k"], ["v"], ["out"]]
    agree(model, X)


def test_a_family_ends_when_one_does_not_come():
    model, adapters = make()
    agree(model, X)
    model.calls = ("q", "v")
    agree(model, X)
    agree(model, X)
    assert families(adapters) == [["q"], ["k"], ["v"], ["out"]]
    model.calls = ("q", "k", "v")
    agree(model, X)


def test_an_input_that_was_changed_in_between_is_noticed():
    model, _ = make()
    model(X)
    x = X.clone()
    with torch.no_grad():
        expected = plain(model).k(x + 1)
    model.q(x)
    x += 1
    torch.testing.assert_close(model.k(x), expected, rtol=1e-11, atol=1e-11)


def test_weights_that_are_exchanged_in_between_are_used():
    model, _ = make()
    model(X)
    given = {n: torch.randn_like(p) for n, p in model.k.named_parameters() if p.requires_grad}
    with torch.no_grad():
        expected = torch.func.functional_call(plain(model).k, given, (X,))
    model.q(X)
    torch.testing.assert_close(torch.func.functional_call(model.k, given, (X,)), expected, rtol=1e-11, atol=1e-11)


def test_keys_and_values_of_a_memory_are_siblings_without_the_query():
    model, adapters = make()
    model.memory = X.flip(0).clone()
    agree(model, X)
    assert families(adapters) == [["q"], ["k", "v"], ["out"]]
    agree(model, X)
    assert together(model, X) == 2


def test_outputs_may_be_changed_in_place():
    model, _ = make()

    def call(x):
        q = torch.relu_(model.q(x))
        k = model.k(x).mul_(2)
        return q[..., :4] + k + model.v(x)

    def expected(x, twin):
        return torch.relu(twin.q(x))[..., :4] + 2 * twin.k(x) + twin.v(x)

    twin = plain(model)
    for _ in range(3):
        torch.testing.assert_close(
            gradients(model, X, call)[:2], gradients(twin, X, lambda x: expected(x, twin))[:2], rtol=1e-11, atol=1e-11
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_from_the_first_step_on(reentrant):
    model, _ = make()
    for _ in range(3):
        agree(model, X, lambda x: checkpoint(model, x, use_reentrant=reentrant))
        agree(model, X)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_one_of_them(reentrant):
    model, adapters = make()

    def call(x):
        return model.q(x)[..., :4] + checkpoint(model.k, x, use_reentrant=reentrant) + model.v(x)

    model(X)
    assert families(adapters)[0] == ["q", "k", "v"]
    for _ in range(2):
        twin = plain(model)
        expected = gradients(twin, X, lambda x, twin=twin: twin.q(x)[..., :4] + twin.k(x) + twin.v(x))
        for one, other in zip(gradients(model, X, call), expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_no_graph_for_who_asks_for_none():
    model, _ = make()
    model(X)
    model.q(X)
    with torch.no_grad():
        assert not model.k(X).requires_grad


def test_autocast_and_a_change_of_it():
    model, adapters = make()
    model.float()
    for adapter in adapters:
        assert adapter.P.dtype == torch.float32
    x, twin = X.float(), plain(model)
    for enabled in (True, True, False, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out, expected = model(x), twin(x)
        torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    assert families(adapters)[0] == ["q", "k", "v"]
    model.q(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.k(x).dtype == torch.bfloat16


@pytest.mark.parametrize("change", ["eval", "no_grad", "dropout"])
def test_who_computes_otherwise_computes_alone(change):
    model, adapters = make(dropout=0.5 if change == "dropout" else 0.0)
    model(X)
    if change == "dropout":
        assert families(adapters) == []
    elif change == "eval":
        model.v.eval()
        assert together(model, X) == 1
    else:
        with torch.no_grad():
            model(X)
        assert together(model, X) == 3


def test_ranks_that_leave_take_their_layer_out_of_the_family():
    model, adapters = make()
    agree(model, X)
    for ranks, expected in (([2, 1, 3, 3], 3), ([2, 0, 3, 3], 2), ([0, 0, 1, 1], 1)):
        prune(adapters, ranks)
        agree(model, X)
        assert together(model, X) == expected


def test_a_rank_drawn_for_a_step_is_computed_alone():
    model, adapters = make()
    agree(model, X)
    for adapter in adapters:
        adapter.drawn = 2
    assert together(model, X) == 1
    agree(model, X)


def test_a_copy_meets_its_own_siblings_and_a_model_is_freed_at_once():
    model, adapters = make()
    model(X)
    twin = copy.deepcopy(model)
    assert twin.q.family is None
    twin(X)
    assert twin.q.family.members == [twin.q, twin.k, twin.v]
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model, adapters
        assert gone() is None
    finally:
        gc.enable()


def test_a_resumed_run_begins_with_the_families_it_had():
    def controlled():
        model, adapters = make()
        controller = ra.RankController(adapters, ra.RankBudget(fraction=0.5), 20)
        return model, adapters, controller, torch.optim.AdamW(adapters.parameters())

    def step(model, controller, optimizer):
        model(X).square().sum().backward()
        controller.observe()
        optimizer.step()
        controller.update(optimizer)
        optimizer.zero_grad()

    model, adapters, controller, optimizer = controlled()
    step(model, controller, optimizer)
    state, weights = controller.state_dict(), copy.deepcopy(model.state_dict())
    again, fresh, other, _ = controlled()
    again.load_state_dict(weights)
    assert families(fresh) == []
    other.load_state_dict(state)
    assert families(fresh) == families(adapters) == [["q", "k", "v"], ["out"]]
    assert together(again, X) == 3
